"""Text files and hub datasets in; documents, and a ledger of everything that was rejected, out."""
