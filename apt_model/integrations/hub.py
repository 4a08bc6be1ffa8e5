"""A model on the Hugging Face Hub: its configuration, and the headers of its files. No weights come."""

from pathlib import Path
from typing import Any, NamedTuple

from apt_model.core.errors import CheckpointError, MissingExtraError
from apt_model.core.fp4_storage import CONFIG_FILE
from apt_model.core.tensor_files import BITS
from apt_model.core.tensor_folders import read_json


class RemoteModel(NamedTuple):
    """A model that stays where it is."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Type and shape by name."""


def look_up(repository: str) -> RemoteModel:
    """Ask the Hub for 'organisation/name'; HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are heeded.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        CheckpointError: there is no such model, it has no safetensors, or the Hub cannot be reached.
    """
    try:
        import huggingface_hub  # noqa: PLC0415 - not everywhere, and takes a while
        from huggingface_hub import errors  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(f"a model of the Hub ({repository})", "huggingface_hub", "hf") from error
    try:
        found = huggingface_hub.get_safetensors_metadata(repository)
        path = huggingface_hub.hf_hub_download(repository, CONFIG_FILE)
    except errors.NotASafetensorsRepoError as error:
        raise CheckpointError(
            f"{repository} has no safetensors on the Hub: only those have headers to plan from",
            remedy="download it, save it with save_pretrained, and give the folder",
        ) from error
    except (_of_the_client(errors), errors.SafetensorsParsingError, OSError, ValueError) as error:
        words = " ".join(str(error).split())
        raise CheckpointError(
            f"{repository} cannot be looked up on the Hub: {words}"[:400],
            remedy="see that the name is right and that you may read it (hf auth login), or give a folder",
        ) from error
    tensors = {
        name: (str(info.dtype), tuple(info.shape))
        for file in found.files_metadata.values()
        for name, info in file.tensors.items()
    }
    if unknown := sorted({dtype for dtype, _ in tensors.values()} - BITS.keys()):
        raise CheckpointError(f"{repository} has tensors of type {unknown[0]}, whose size this version does not know")
    return RemoteModel(read_json(Path(path)), tensors)


def _of_the_client(errors: Any) -> type[Exception]:
    """What the Hub's own client raises when it reaches nobody: another class in every major version."""
    return next(each for each in errors.HfHubHTTPError.__mro__ if each.__name__ == "HTTPError")
