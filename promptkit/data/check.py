"""What of the real datasets is there, what is missing or damaged, and what to do about
it.
"""

import warnings
from dataclasses import dataclass

from tqdm import tqdm

from promptkit.data.benchmark import PARTS, TABLE, data_root, read, remedy
from promptkit.data.content import workers
from promptkit.data.images import read_image
from promptkit.errors import InputError


@dataclass(frozen=True)
class Report:
    """The state of a dataset's folder.

    Attributes:
        state: "ready"; "home-made", of its split; "differs" from the benchmark's
            counts; "missing"; "damaged".
        counts: classes, then images for training, validation and testing; None if they
            cannot be told.
        note: what is wrong and what to do.
    """

    name: str
    folder: str
    state: str
    counts: tuple[int, int, int, int] | None = None
    note: str = ""


def check(name: str, root=None, images: bool = False) -> Report:
    """Look at a dataset's folder; nothing is written there.

    Args:
        name: a real dataset.
        images: decode every image too, which takes as long as it sounds.
    """
    folder = str(data_root(root) / TABLE[name].folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its notes say the same
            listing = read(name, root, keep=False)
    except InputError as error:
        missing = not (data_root(root) / TABLE[name].folder).is_dir()
        return Report(
            name,
            folder,
            *(
                ("missing", None, remedy(name, root))
                if missing
                else ("damaged", None, str(error))
            ),
        )
    bad = _unreadable(listing, name) if images else []
    if bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        return Report(name, folder, "damaged", listing.counts, bad[0] + more)
    notes, split_file = list(listing.notes), TABLE[name].split_file
    if listing.state == "ready" and split_file:
        notes.append(
            f"whether {split_file} is the published one cannot be told: CoOp's own code"
            " writes one of this name with as many images where it is missing; if yours"
            f" may be that, get it by 'promptkit data download {name} --force'"
        )
    return Report(name, folder, listing.state, listing.counts, "; ".join(notes))


def _unreadable(listing, name):
    """What is wrong with the images that cannot be decoded, a sentence each."""
    paths = list(
        dict.fromkeys(path for part in PARTS for path in listing.files[part].paths)
    )

    def problem(path):
        try:
            read_image(listing.folder / path)
        except InputError as error:
            return str(error)

    found = tqdm(
        workers().map(problem, paths),
        total=len(paths),
        desc=f"decoding {name}",
        unit="image",
        leave=False,
    )
    return [text for text in found if text]
