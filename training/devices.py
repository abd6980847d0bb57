"""The GPUs that a process takes."""

from transformers import TrainingArguments


def one_gpu(arguments: TrainingArguments) -> TrainingArguments:
    """The arguments, with one GPU where a process without a launcher sees several.

    The Trainer would put the model into nn.DataParallel, which routed layers refuse.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
