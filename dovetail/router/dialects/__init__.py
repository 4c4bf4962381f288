"""One module per wire format; each gives its routes."""
