"""What must hold before a run's models score anything: they are of the run, its code, its cascade and its log."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deep_components.cascade import Cascade
from deep_components.dataset.log import ENCODING_FOLDER as ENCODING_OF_LOG
from deep_components.dataset.log import Log
from deep_components.errors import InputError
from deep_components.files import folder_checksum
from deep_components.models import MODELS, model_classes
from deep_components.runs import code
from deep_components.runs.folder import ENCODING_FOLDER


def check_cascade(folder: Path, own: Cascade, wanted: Cascade | None) -> None:
    """InputError unless what a folder holds is of the ``wanted`` cascade, None being any without models of one's own:
    a folder is data, and does not say which code is executed."""
    if wanted is not None and own != wanted:
        what = f"of {own.name}" if own.name != wanted.name else f"of another cascade than {wanted.name}"
        raise InputError(f"{folder}: a run {what}; use the command or the --cascade that it was trained with")
    foreign = [stage.model for stage in own.stages if stage.model not in MODELS]
    if wanted is None and foreign:
        raise InputError(
            f"{folder}: its cascade names {foreign[0]!r}, which is none of this project's models; to import that code, "
            "give the cascade's file with --cascade"
        )


def check_encoding(run: Path, config: Mapping[str, Any]) -> None:
    """InputError unless the run's copy of its log's encoding is whole."""
    known = config.get("encoding_checksum")
    if "encoding_checksum" in config and folder_checksum(run / ENCODING_FOLDER) != known:
        raise InputError(f"{run / ENCODING_FOLDER}: missing or damaged; copy it again, or train again")


def check_log(run: Path, config: Mapping[str, Any], log: Log) -> None:
    """InputError unless the run's models can take the log's indices."""
    encoding, same = config.get("encoding_checksum", log.encoding_checksum), "use the log that it was trained on"
    if config.get("schema_checksum", log.schema.checksum) != log.schema.checksum:
        raise InputError(f"{log.folder}: its fields or id counts differ from those of the run's data; {same}")
    if encoding != log.encoding_checksum:
        raise InputError(f"{log.folder / ENCODING_OF_LOG}: maps values to other ids than the run's data did; {same}")
    if config["data"] not in (log.origin, "unknown"):  # unknown: imported models
        raise InputError(f"{run}: trained on {config['data']} data, but {log.folder} is {log.origin}; {same}")


def checked_code(run: Path, config: Mapping[str, Any], cascade: Cascade, any_code: bool) -> dict[str, Any]:
    """What metrics.json says of the evaluation's code. InputError when the models were trained by other code, as far as
    it takes part in scoring, unless ``any_code`` will do."""
    ran = code.evaluation_code(config.get("code"), model_classes(cascade))
    changed = code.changed_since_training(ran)
    if changed and not any_code:
        raise InputError(
            f"{run}: was trained by other code: {code.named(changed)}; train it again, or use it all the same "
            "with --any_code"
        )
    return ran


def time_zone_of(run: Path, config: Mapping[str, Any], wanted: str | None) -> str:
    """The time zone of the training, which another ``wanted`` one must not replace; imported models know none."""
    own = str(config["arguments"]["time_zone"])
    if wanted not in (None, own) and config["data"] != "unknown":
        raise InputError(f"--time_zone={wanted}: {run} was trained with {own}; leave the option out, or train again")
    return wanted or own


def check_same_log(
    run: Path, config: Mapping[str, Any], log: Log, cascade: Cascade, cache_dir: Path | None, zone: str
) -> None:
    """InputError unless the days that the run was trained on, as far as the log has them, are the same there.

    Days of the cache are compared by what it says of itself; where it has none of them, the last one is encoded."""
    known = config.get("data_checksums") or {}  # none: an untrained cascade, imported models, an earlier version
    there = sorted(known.keys() & set(log.days(named=True)))
    if known and not there:
        raise InputError(
            f"{log.folder}: has none of the days that {run} was trained on ({', '.join(sorted(known))}), so nothing "
            "tells that it is the same log; put one of them there"
        )
    found = {day: log.checksum(day, cascade, cache_dir, zone) for day in there}
    if there and not any(found.values()):
        found[there[-1]] = log.open_day(there[-1], cascade, cache_dir, zone).checksum
    for day, checksum in found.items():
        if checksum is not None and checksum != known[day]:
            raise InputError(
                f"{log.folder}: its day {day} is not the one that {run} was trained on; evaluate on the same log, "
                "encoded by the same version"
            )
