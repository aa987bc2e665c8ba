"""The engine's real frontend process over fake_core.py: `fake_engine.py MODE PACE LOG ENGINE-SETTINGS...`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from services.common.settings import parse_settings
from services.common.telemetry import configure_logging
from services.engine.__main__ import serve
from services.engine.config import EngineSettings
from services.engine.frontend.tokenizer import load_tokenizer

mode, pace, log, *argv = sys.argv[1:]
settings = parse_settings(EngineSettings, "engine", argv)
configure_logging("engine", settings.log_level)
core = [sys.executable, str(Path(__file__).with_name("fake_core.py"))]
tokenizer = load_tokenizer(Path(settings.checkpoint))
sys.exit(asyncio.run(serve(settings, tokenizer, lambda fd: [*core, str(fd), mode, "--pace", pace, "--log", log])))
