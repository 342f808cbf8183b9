"""From a trained run to served lists: a bundle of models, encoding, corpus and index. Knows no training.

``from deep_components.serving import Recommender`` loads the models' libraries only then.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deep_components.serving.recommender import Candidate, Recommendation, Recommender

__all__ = ["Candidate", "Recommendation", "Recommender"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deep_components.serving import recommender

    return getattr(recommender, name)
