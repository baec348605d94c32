"""What binds each artifact: ceilings of the machine, bytes and FLOPs, remedies."""
