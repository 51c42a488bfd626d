"""What can go wrong, by name.

Every error that a user can mend is one of these. Its message is one line that says where (file, key or argument), what was
found, what was expected and what to do next; the command line prints it and exits with 2. Anything else that is raised is a
defect of ours.
"""


class SdcoreError(Exception):
    """Base of every error that the user can mend."""


class CheckpointError(SdcoreError):
    """A weight file or model folder that cannot be read, is damaged, or does not fit the model."""


class AdapterError(SdcoreError):
    """A LoRA, embedding or control that does not fit the model it is handed to."""


class PromptError(SdcoreError, ValueError):
    """A prompt that is no text, is too long to be meant, or has a grammar that does not close."""


class ConfigError(SdcoreError, ValueError):
    """An argument outside its range, or a combination of arguments that has no meaning."""


class ImageError(SdcoreError):
    """A picture that cannot be read, or is too large or too small to be used."""


class NonFiniteError(SdcoreError):
    """NaN or infinity appeared; the message names the stage and the step, so that no black picture is ever saved."""


class TrainingError(SdcoreError):
    """A run that cannot start, go on, or be resumed as asked."""
