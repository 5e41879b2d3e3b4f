"""A real one-node Kubernetes to try and test Yuan2 on, and the images to run on it.

Standard library only, so that it runs with any Python >= 3.10 before a virtual environment exists.
"""
