"""Published pretrained models by name. Their files stay where the authors published them.

Repositories and the file of the first: README.md of https://github.com/IGNF/MAESTRO and the model cards it links. What
could not be determined is empty: file sizes and shapes are read from the file, the licence is on the model card.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedModel:
    """A model that ``load_model(name)`` fetches.

    ``repository``: on the Hugging Face hub. ``dataset``: whose preset describes the sensors. ``size``: a name of
    ``model/sizes.py``. ``checkpoint``: the file in the repository; empty: its only ``.ckpt`` file. ``license``: of the
    weights, as the repository states it; empty where this is not known here.
    """

    name: str
    repository: str
    dataset: str
    size: str
    checkpoint: str = ""
    license: str = ""

    @property
    def address(self) -> str:
        """Its address for ``load_model``."""
        return f"hf://{self.repository}"


PUBLISHED = {
    model.name: model
    for model in (
        PublishedModel(
            "maestro-flair-hub-base",
            "IGNF/MAESTRO_FLAIR-HUB_base",
            "flair_hub",
            "base",
            "MAESTRO_FLAIR-HUB_base/checkpoints/pretrain-epoch=99.ckpt",
            "apache-2.0",  # https://huggingface.co/IGNF/MAESTRO_FLAIR-HUB_base/blob/main/README.md
        ),
        PublishedModel(
            "maestro-s2-naip-urban-base",
            "IGNF/MAESTRO_S2-NAIP-urban_base",
            "s2_naip",
            "base",
        ),
    )
}


def published_in(repository: str) -> PublishedModel | None:
    """The published model of a repository of the hub."""
    return next((m for m in PUBLISHED.values() if m.repository.lower() == repository.lower()), None)
