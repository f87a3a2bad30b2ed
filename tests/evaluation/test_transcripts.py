"""Answers side by side as people read them, and what of a sample is kept."""

import base64
import io

import pytest
import torch
from PIL import Image

from optimum_qvlm.data.picture import read_picture
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.evaluation.compare import Observation
from optimum_qvlm.evaluation.fidelity import IGNORED
from optimum_qvlm.evaluation.transcripts import PROMPT, SIDE, small_picture, transcripts
from tests.tiny_models import word_tokenizer
