"""Stages of the check of a GPU: what half an hour on one must tell, each as a file of figures."""
