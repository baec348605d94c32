"""Training that makes up for compression and leaves masks, codes and ranks as they are."""
