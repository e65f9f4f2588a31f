"""The bundle on Kubernetes: manifests written by hand, and those that follow from stack.yml."""
