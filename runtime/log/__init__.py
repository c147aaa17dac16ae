"""The event log: one protocol, on JetStream and in memory; blobs; the embedded server."""
