"""What the operator, the trainer and the server of Yuan2 on Kubernetes share: no torch, no Kubernetes."""
