"""Imported by the process that ranks are forked from: its ranks find the GPUs of `fake_cuda`."""

import os

import fake_cuda

fake_cuda.install(int(os.environ["FAKE_GPUS"]))
