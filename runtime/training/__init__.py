"""What a training job computes with and from, in the service and when it is made again."""
