"""From what Kubernetes recorded to causes. Standard library only: it runs wherever kubectl does."""
