"""What every engine shares: requests in, events out, sampling, stopping."""
