"""Learn a smaller structure for a Flax CNN, with the original network as its teacher."""

from jaxkd.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    ExportError,
    GraphError,
    JaxkdError,
    TrainingError,
)
from jaxkd.graph.cut import cut, mask, verify
from jaxkd.graph.latency import with_latency
from jaxkd.graph.settle import compact
from jaxkd.graph.structure import CompactModel, Structure
from jaxkd.graph.trace import ChannelGroup, Graph, trace
from jaxkd.saved import load, save
from jaxkd.search.expand import expand
from jaxkd.search.prune import prune
from jaxkd.search.select import select
from jaxkd.search.training import Search, SearchResult, learn_structure

__all__ = [
    'BudgetError',
    'ChannelGroup',
    'CheckpointError',
    'CompactModel',
    'ConfigError',
    'ExportError',
    'Graph',
    'GraphError',
    'JaxkdError',
    'Search',
    'SearchResult',
    'Structure',
    'TrainingError',
    'compact',
    'cut',
    'expand',
    'learn_structure',
    'load',
    'mask',
    'prune',
    'save',
    'select',
    'trace',
    'verify',
    'with_latency',
]
