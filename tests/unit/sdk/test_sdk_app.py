"""Apps and graphs: what decorators declare ends up in definitions, and all mistakes are told at once."""

import subprocess
import sys
import textwrap

import pytest

import tidegate
from tidegate import App, AppError, Graph, GraphError, Plan, State, ToolCall, functions_of, load_app
from tidegate.domain import canonical
from tidegate.domain.workflow import compile_definition, validate_definition


@pytest.fixture
def app():
    app = App("shop")

    @app.tool(cost_micros=2000, idempotent=False, retries=0, timeout_s=1.5)
    def refund(order_id: str, amount: int) -> int:
        """Pay back."""
        return amount

    @app.step(queue="slow", backoff_s=1, backoff_factor=3, backoff_max_s=9)
    def look_up(order: dict) -> dict:
        return order

    @app.step
    async def email(text: str) -> None: ...

    @app.agent(tools=[refund, "look_elsewhere"])
    def triage(state: State) -> Plan:
        return Plan("done")

    @app.tool
    def look_elsewhere() -> None: ...

    return app


@pytest.mark.feature("G1")
def test_a_graph_becomes_a_definition(app):
    graph = app.graph("refunds", "2", max_steps=9)
    graph.node("find", "look_up").node("decide", "triage", input={"order": "${ nodes.find }"}).node("tell", "email")
    graph.chain("find", "decide", "tell").output("${ nodes.decide }").input_schema({"type": "object"})
    definition = app.definition(graph)
    assert definition == {
        "name": "refunds",
        "version": "2",
        "nodes": {
            "find": {"kind": "step", "function": "look_up"},
            "decide": {"kind": "agent", "function": "triage", "input": {"order": "${ nodes.find }"}},
            "tell": {"kind": "step", "function": "email"},
        },
        "edges": [["find", "decide"], ["decide", "tell"]],
        "output": "${ nodes.decide }",
        "input_schema": {"type": "object"},
        "max_steps": 9,
        "functions": definition["functions"],
    }
    assert list(definition["functions"]) == ["email", "look_elsewhere", "look_up", "refund", "triage"]
    assert definition["functions"]["refund"] == {
        "kind": "tool",
        "queue": "default",
        "timeout_ms": 1500,
        "max_attempts": 1,
        "backoff_ms": 200,
        "backoff_factor": 2.0,
        "backoff_max_ms": 60000,
        "reserve_micros": 2000,
        "idempotent": False,
        "description": "Pay back.",
        "parameters": {
            "type": "object",
            "properties": {
                "order_id": {"title": "Order Id", "type": "string"},
                "amount": {"title": "Amount", "type": "integer"},
            },
            "required": ["order_id", "amount"],
            "additionalProperties": False,
        },
    }
    look_up = definition["functions"]["look_up"]
    assert (look_up["queue"], look_up["max_attempts"], look_up["backoff_ms"], look_up["backoff_max_ms"]) == (
        "slow",
        5,
        1000,
        9000,
    )
    assert definition["functions"]["triage"]["tools"] == ["refund", "look_elsewhere"]
    assert definition["functions"]["triage"]["timeout_ms"] == 120_000
    compile_definition(canonical.dumps(definition))


@pytest.mark.feature("G1")
def test_chains_of_functions(app):
    look_up, email = app.functions["look_up"].call, app.functions["email"].call
    definition = app.definition(Graph("two").chain(look_up, email))
    assert definition["edges"] == [["look_up", "email"]]
    assert list(definition["functions"]) == ["email", "look_up"]


@pytest.mark.feature("G1")
def test_everything_wrong_is_said_at_once(app):
    def stranger(x): ...

    graph = (
        Graph("bad")
        .node("a", "look_up")
        .node("a", "email")
        .node("b", "nobody")
        .node("c", stranger)
        .node("d", "refund")
        .node("e", "email", input={"x": "${ 1 + }"})
        .node("f", "email", input=object())
        .chain("a", "b", "a")
        .edge("a", "nowhere")
    )
    with pytest.raises(GraphError) as failure:
        app.definition(graph)
    text = str(failure.value)
    assert text.startswith("workflow bad@1 cannot run:\n  - ")
    for part in (
        "nodes.a: there twice",
        "unknown function 'nobody'",
        "function 'stranger' is not registered",
        "'refund' is a tool, not a step",
        "nodes.e.input",
        "nodes.f.input: object has no JSON form",
        "names an unknown node",
    ):
        assert part in text, part
    assert len(failure.value.problems) >= 7


@pytest.mark.feature("T1")
def test_every_agent_is_a_workflow_of_its_own(app):
    app.graph("one").node("find", "look_up")
    graph, agent = app.definitions()
    assert graph["name"] == "one"
    assert agent["name"] == "agent:triage"
    assert agent["nodes"] == {"triage": {"kind": "agent", "function": "triage"}}
    assert list(agent["functions"]) == ["look_elsewhere", "refund", "triage"]
    assert validate_definition(agent) == []


def test_the_version_of_an_agents_workflow_is_made_of_its_content():
    def definition(timeout_s: float) -> dict:
        app = App("shop")

        @app.agent(timeout_s=timeout_s)
        def triage(state): ...

        return app.agent_definition("triage")

    assert definition(1)["version"] == definition(1)["version"]
    assert definition(1)["version"] != definition(2)["version"]


def test_an_agent_with_an_unknown_tool_is_refused():
    app = App("shop")

    @app.agent(tools=["nothing"])
    def triage(state): ...

    with pytest.raises(GraphError, match="'nothing' is not a tool"):
        app.definitions()


def test_decorators_return_the_function_itself(app):
    @app.tool
    def double(x: int) -> int:
        return 2 * x

    assert double(2) == 4
    assert app.name_of(double) == "double"


def test_names_are_given_once(app):
    with pytest.raises(AppError, match="has a tool of that name already"):

        @app.step(name="refund")
        def other(): ...


@pytest.mark.parametrize(
    "options",
    [
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"retries": -1},
        {"backoff_s": 0},
        {"backoff_factor": 0.5},
        {"backoff_s": 2, "backoff_max_s": 1},
        {"cost_micros": -1},
        {"queue": "a b"},
        {"name": "1st"},
    ],
)
def test_bad_options_are_refused_at_once(app, options):
    def fine(): ...

    with pytest.raises(AppError):
        app.tool(**options)(fine)
    assert "fine" not in app.functions


def test_unknown_options_are_refused(app):
    def fine(): ...

    with pytest.raises(TypeError, match="retrys"):
        app.tool(retrys=1)(fine)


def test_the_queue_of_the_app_is_the_default():
    app = App("shop", queue="gpu")

    @app.tool
    def here(): ...

    @app.tool(queue="cpu")
    def there(): ...

    assert [app.functions[name].settings.queue for name in ("here", "there")] == ["gpu", "cpu"]


def test_what_an_executor_offers(app):
    assert functions_of(app) == ["agent:triage", "step:email", "step:look_up", "tool:look_elsewhere", "tool:refund"]


def test_async_functions_are_recognised(app):
    class Mail:
        async def __call__(self, text: str) -> None: ...

    app.step(name="mail")(Mail())
    assert app.functions["mail"].is_async
    assert app.functions["email"].is_async
    assert not app.functions["look_up"].is_async


def test_plans_are_checked_when_they_are_made():
    with pytest.raises(TypeError, match="list of ToolCall"):
        Plan(tool_calls=[{"name": "x"}])
    with pytest.raises(TypeError, match="the answer goes into `output`"):
        Plan(final="42")
    assert Plan("c", [ToolCall("t", {"a": (1,)}, "id")], output={"x": 1}).to_json() == {
        "content": "c",
        "tool_calls": [{"id": "id", "name": "t", "arguments": {"a": [1]}}],
        "final": None,
        "output": {"x": 1},
    }


def test_state_accessors():
    def call(name, ok, output):
        return {"id": "", "name": name, "arguments": {}, "ok": ok, "output": output, "error": None if ok else "no"}

    state = State.from_json(
        {
            "input": 1,
            "turn": 3,
            "history": [
                {"content": "a", "calls": [call("x", True, 1), call("y", True, 2)]},
                {"content": "b", "calls": [call("x", False, None)]},
            ],
        }
    )
    assert [seen.name for seen in state.observations()] == ["x", "y", "x"]
    assert [seen.ok for seen in state.observations("x")] == [True, False]
    assert state.last().error == "no"
    assert state.last("y").output == 2
    assert state.last("z") is None
    assert (state.output_of("x"), state.output_of("z", 5)) == (1, 5)


# --- finding an app ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if not name.startswith("tidegate"):
            del sys.modules[name]


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))


def test_apps_are_found_by_module_file_or_alone(folder):
    write(folder / "one_app.py", "from tidegate import App\nshop = App('shop')\n")
    write(folder / "sub" / "two_apps.py", "from tidegate import App\na = App('a')\nb = App('b')\n")
    assert load_app("one_app").name == "shop"
    assert load_app("one_app:shop").name == "shop"
    assert load_app("sub/two_apps.py:b").name == "b"
    with pytest.raises(AppError, match="two_apps has 2 apps: name one as two_apps:ATTRIBUTE"):
        load_app("sub/two_apps.py")
    with pytest.raises(AppError, match="no App named 'c'"):
        load_app("sub/two_apps.py:c")
    with pytest.raises(AppError, match="there is no module 'nowhere'"):
        load_app("nowhere:app")
    with pytest.raises(AppError, match="there is no file"):
        load_app("nowhere.py:app")


def test_errors_of_the_apps_own_imports_pass_through(folder):
    write(folder / "needs.py", "import surely_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        load_app("needs:app")


def test_signatures_are_checked_when_the_app_is_loaded(folder):
    write(
        folder / "wrong.py",
        """
        from tidegate import App
        app = App("wrong")
        @app.tool
        def first(*args): ...
        @app.agent
        def second(): ...
        """,
    )
    with pytest.raises(AppError) as failure:
        load_app("wrong:app")
    assert "tool 'first'" in str(failure.value)
    assert "agent 'second'" in str(failure.value)


def test_module_level_decorators_use_a_default_app(folder):
    write(folder / "plain.py", "from tidegate import tool\n@tool\ndef plain_tool(x: int) -> int: return x\n")
    assert "plain_tool" in load_app("plain").functions


def test_the_package_exports_what_it_lists_and_loads_it_late():
    for name in tidegate.__all__:
        assert getattr(tidegate, name) is not None
    assert set(tidegate.__all__) <= set(dir(tidegate))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tidegate.nothing


def test_importing_the_package_loads_neither_kafka_nor_pydantic():
    code = "import sys, tidegate, tidegate.domain.messages; print([m for m in ('confluent_kafka', 'pydantic') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code]).strip() == b"[]"
    code = "import sys; from tidegate import App, Plan; print('confluent_kafka' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code]).strip() == b"False"
