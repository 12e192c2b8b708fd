"""What looks at the machine: each probe answers for itself, and none can bring down the others."""
