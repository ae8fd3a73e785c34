"""Traffic from Prometheus' HTTP API, of Pods by name: of their time in this revision, and nobody else's."""

import json
import re
import urllib.error
import urllib.parse
import urllib.request

from .traffic import COUNTED, REFERENCE, EvidenceError, Traffic


def _ask(url: str, query: str) -> list[tuple[dict[str, str], float]]:
    data = urllib.parse.urlencode({"query": query}).encode()
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/v1/query", data, timeout=30) as answer:  # noqa: S310
            result = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise EvidenceError(f"Prometheus answers {error.code} to {query}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvidenceError(f"Prometheus at {url} gives no answer: {error}") from None
    return [(each["metric"], float(each["value"][1])) for each in result]


def traffic(url: str, namespace: str, pods: list[str], seconds: int) -> Traffic:
    """The last `seconds` of these Pods. Raises EvidenceError."""
    found = Traffic()
    if not pods:
        return found
    names = "|".join(re.escape(name) for name in pods)
    chosen = f"{{namespace={json.dumps(namespace)},pod=~{json.dumps(names)}}}"
    for metric, label, part in COUNTED:
        query = f"sum by ({label}) (increase({metric}{chosen}[{seconds}s]))"
        getattr(found, part).update({labels.get(label, ""): value for labels, value in _ask(url, query)})
    query = f"max by (label) ({REFERENCE}{chosen})"
    found.reference.update({labels.get("label", ""): value for labels, value in _ask(url, query)})
    return found
