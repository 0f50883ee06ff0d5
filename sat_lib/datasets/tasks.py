"""The table of classification tasks: shape, vocabulary, classes and official files of each."""

import functools
from dataclasses import dataclass, field

import numpy as np

from ..common.errors import require
from .downloads import Official, officials


@dataclass(frozen=True)
class Task:
    """What a classification task is made of; a value of `TASKS`."""

    name: str
    kind: str  # "image", "text" or "symbols"
    length: int  # L, tokens per example; 0 is padding (and black)
    vocab: int
    classes: tuple[str, ...]  # names in the order of the labels
    loader: str  # "cifar10", "inaturalist", "csv", or embedded: "digits", "docstrings", "listops"
    sizes: dict[str, int] = field(hash=False)  # examples per split of the official or embedded set; fewer may be cached
    masked_attention: bool = False  # attention masked by padding; every task masks the mean over positions
    dev_share: float = 0.05  # of train, at most 10,000; 0 where the set has a dev split of its own
    published_dev_is_test: bool = False
    columns: tuple[str, ...] = ()  # of a csv file
    folder: str = ""  # what the official archive unpacks to
    archive: str = ""  # the official archive, where one file holds everything
    official: tuple[Official, ...] = ()
    packages: tuple[str, ...] = ("numpy",)  # whose versions the cache depends on

    @property
    def embedded(self) -> bool:
        """Made without any download, by `load` when it is missing."""
        return self.loader in ("digits", "docstrings", "listops")

    @property
    def dtype(self) -> np.dtype:
        """Of a stored token: uint8 (images) or uint16."""
        return np.dtype(np.uint8 if self.kind == "image" else np.uint16)


_CIFAR = "cifar-10-python.tar.gz"
_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_INAT_URL = "https://ml-inat-competition-datasets.s3.amazonaws.com/2018/"
_INAT_FILES = {
    "train2018.json.tar.gz": "bfa29d89d629cbf04d826a720c0a68b0",
    "val2018.json.tar.gz": "f2ed8bfe3e9901cdefceb4e53cd3775d",
    "train_val2018.tar.gz": "b1c6952ce38f31868cc50ea72d066cc3",
}
_INAT_CLASSES = (
    "Actinopterygii", "Amphibia", "Animalia", "Arachnida", "Aves", "Bacteria", "Chromista",
    "Fungi", "Insecta", "Mammalia", "Mollusca", "Plantae", "Protozoa", "Reptilia",
)  # fmt: skip
_AG_URL = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"
_AG_FILES = {"train.csv": "b1a00f826fdfbd249f79597b59e1dc12", "test.csv": "d52ea96a97a2d943681189a97654912d"}
_YELP = "yelp_review_polarity_csv.tgz"
_YELP_DIGEST = "528f22e286cad085948acbc3bea7e58188416546b0e364d0ae4ca0ce666abe35"
_LIBRARIES = ("torch", "scipy", "pandas", "matplotlib")
_NUMERALS = tuple("0123456789")

_text = functools.partial(
    Task, kind="text", length=1024, vocab=512, masked_attention=True, loader="csv", published_dev_is_test=True
)  # fmt: skip
_digits = functools.partial(
    Task, kind="image", vocab=256, classes=_NUMERALS, loader="digits", sizes={"train": 1_437, "test": 360},
    dev_share=0.1, packages=("scikit-learn", "pillow"),
)  # fmt: skip

TASKS: dict[str, Task] = {
    entry.name: entry
    for entry in (
        Task(
            "cifar10", "image", 1024, 256, _CIFAR_CLASSES, "cifar10", {"train": 50_000, "test": 10_000}, dev_share=0.1,
            folder="cifar-10-batches-py", archive=_CIFAR,
            official=officials("https://www.cs.toronto.edu/~kriz/", {_CIFAR: "c58f30108f718f92721af3b95e74349a"}),
        ),
        Task(
            "inaturalist", "image", 1024, 512, _INAT_CLASSES, "inaturalist", {"train": 437_513, "test": 24_426},
            published_dev_is_test=True, packages=("numpy", "pillow"),
            official=officials(_INAT_URL, _INAT_FILES),
        ),
        _text(
            "agnews", classes=("World", "Sports", "Business", "Sci/Tech"), sizes={"train": 120_000, "test": 7_600},
            columns=("class", "title", "description"), folder="ag_news_csv",
            official=officials(_AG_URL, _AG_FILES),
        ),
        _text(
            "yelp", classes=("negative", "positive"), sizes={"train": 560_000, "test": 38_000},
            columns=("class", "text"), folder="yelp_review_polarity_csv", archive=_YELP,
            official=officials("https://s3.amazonaws.com/fast-ai-nlp/", {_YELP: _YELP_DIGEST}, "sha256"),
        ),
        _text(
            "imdb", classes=("negative", "positive"), sizes={"train": 25_000, "test": 25_000},
            columns=("class", "text"), folder="imdb",
        ),
        _digits("digits", length=1024),
        _digits("digits16", length=256),
        _text(
            "docstrings", classes=_LIBRARIES, loader="docstrings", sizes={"train": 3_200, "test": 800},
            published_dev_is_test=False, packages=("python", *_LIBRARIES),
        ),
        Task(
            "listops", "symbols", 2000, 16, _NUMERALS, "listops", {"train": 96_000, "dev": 2_000, "test": 2_000},
            dev_share=0,
        ),
    )
}  # fmt: skip


def task(name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: there is none; the message lists the names.
    """
    require(name in TASKS, f"no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
