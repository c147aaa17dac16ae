"""The sandbox: what confines the code that agents write."""
