"""Whether a release may go on: what its Pods and its clients saw, the candidate's beside the stable ones'."""
