"""The plugin as vLLM finds it, where vLLM is not installed."""

from importlib.metadata import entry_points

from tests.jobs import run_python


def test_vllm_finds_the_plugin():
    (plugin,) = entry_points(group="vllm.general_plugins", name="qvlm")
    assert plugin.value == "optimum_qvlm.serving.plugin:register"


def test_what_is_for_servers_is_loaded_by_them_alone():
    """Neither by importing the package, nor is vLLM by importing the plugin."""
    code = """
import sys, optimum_qvlm
print([name for name in sys.modules if name.startswith(("optimum_qvlm.serving", "optimum_qvlm.export", "vllm"))])
import optimum_qvlm.serving.plugin
print("vllm" in sys.modules)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout.split()) == (0, ["[]", "False"])
