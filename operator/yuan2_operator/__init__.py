"""The Yuan2 operator: two custom resources become Jobs, Deployments and Services."""
