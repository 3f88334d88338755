"""Label an exported queue with the models of argilla or label-studio-sdk. Runs in an environment that has both.

    python real_tools.py argilla|label-studio EXPORTED CHOICES LABELED

CHOICES is a JSON object of pair id to [choice, comment]; a choice may be empty.
"""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock


def with_argilla(exported: Path, choices: dict[str, Any], labeled: Path) -> None:
    import argilla
    from argilla.records._io import JsonIO

    argilla.Argilla._default_client = MagicMock()  # the constructor of Settings requires a server's client
    settings = argilla.Settings.from_json(exported.with_suffix(".settings.json"))
    options = {option["value"] for option in settings.questions["choice"].serialize()["settings"]["options"]}
    assert settings.questions["choice"].required
    assert not settings.questions["comment"].required
    records = JsonIO._records_from_json(exported)
    user = uuid.uuid4()
    for record in records:
        assert set(record.fields) <= {field.name for field in settings.fields}
        choice, comment = choices[record.id]
        for question, value in (("choice", choice), ("comment", comment)):
            if value:
                assert question == "comment" or value in options
                record.responses.add(argilla.Response(question, value, user_id=user, status="submitted"))
    JsonIO.to_json(records, labeled)


def with_label_studio(exported: Path, choices: dict[str, Any], labeled: Path) -> None:
    from label_studio_sdk.label_interface import LabelInterface
    from label_studio_sdk.label_interface.objects import AnnotationValue, TaskValue

    interface = LabelInterface(exported.with_suffix(".config.xml").read_text())
    interface.validate()
    tasks = json.loads(exported.read_text())
    for task_number, task in enumerate(tasks, 1):
        TaskValue(id=task_number, **task)
        assert interface.validate_task({"id": task_number, **task})
        choice, comment = choices[task["data"]["pair_id"]]
        result = []
        if choice in ("left", "right"):
            result.append(interface.get_control("comparison").label(choice))
        elif choice and choice != "skip":
            result.append(interface.get_control("neither").label(choice))
        if comment:
            result.append(interface.get_control("comment").label([comment]))
        regions = [region._dict() for region in result]
        annotation = {"id": task_number, "completed_by": 1, "was_cancelled": choice == "skip", "result": regions}
        AnnotationValue(**annotation)
        # The package's pairwise region names itself as its target, which the package's own check rejects.
        checked = [region for region in regions if region["type"] != "pairwise"]
        assert interface.validate_annotation({**annotation, "result": checked})
        task.update(id=task_number, annotations=[annotation] if choice else [], predictions=[])
    labeled.write_text(json.dumps(tasks))


if __name__ == "__main__":
    tool, exported, choices, labeled = sys.argv[1:]
    run_tool = with_argilla if tool == "argilla" else with_label_studio
    run_tool(Path(exported), json.loads(Path(choices).read_text()), Path(labeled))
