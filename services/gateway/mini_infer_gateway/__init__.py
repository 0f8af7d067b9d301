"""The gateway process: speaks gRPC with clients and owns every request."""
