"""What a failure is: its class, its cause and its numbers, from an exception, a text or an exit."""
