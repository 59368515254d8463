import torch

# Tiny tensors: on a busy machine the threads' waiting for each other would take most of the time.
torch.set_num_threads(1)
