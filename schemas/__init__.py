"""Everything that is recorded. Frozen structs, no I/O."""
