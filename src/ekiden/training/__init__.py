"""One loop, one state object, one save path."""
