"""The former home of what is now in folder.py and state.py; goes when nothing imports it any more."""

from deep_components.runs.folder import CONFIG_FILE as CONFIG_FILE
from deep_components.runs.folder import COST_FILE as COST_FILE
from deep_components.runs.folder import LOCK_FILE as LOCK_FILE
from deep_components.runs.folder import METRICS_FILE as METRICS_FILE
from deep_components.runs.folder import PER_REQUEST_FILE as PER_REQUEST_FILE
from deep_components.runs.folder import RUN_FILE as RUN_FILE
from deep_components.runs.folder import SCORES_FILE as SCORES_FILE
from deep_components.runs.folder import STATE_FILE as STATE_FILE
from deep_components.runs.folder import STEP_LOG_FILE as STEP_LOG_FILE
from deep_components.runs.folder import STREAMING_FILE as STREAMING_FILE
from deep_components.runs.folder import read_config as read_config
from deep_components.runs.folder import read_training as read_training
from deep_components.runs.folder import write_json as write_json
