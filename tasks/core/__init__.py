"""What every verb shares; it imports no verb."""
