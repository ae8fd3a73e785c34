"""Schemas of custom resources that no package has models of: the fields that k8s/ uses, and no others."""

from tests.manifests import Object


def strict(properties: Object, required: list[str] | None = None) -> Object:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def several(items: Object, least: int = 1) -> Object:
    return {"type": "array", "items": items, "minItems": least}


TEXT: Object = {"type": "string", "minLength": 1}
LABELS = {"type": "object", "additionalProperties": TEXT}
METADATA = strict({"name": TEXT, "namespace": TEXT, "labels": LABELS, "annotations": LABELS}, ["name"])
SECONDS: Object = {"type": "integer", "minimum": 1}
# A Pod template is checked as Kubernetes' own: see `check`.
RAY_GROUP: Object = {"rayStartParams": {"type": "object", "additionalProperties": TEXT}, "template": {"type": "object"}}
DURATION: Object = {"type": "string", "pattern": r"^([0-9]+(h|m|s|ms))+$"}
PERCENT: Object = {"type": "integer", "minimum": 0, "maximum": 100}
STEPS: list[Object] = [
    strict({"setWeight": PERCENT}),
    strict({"pause": strict({"duration": DURATION}, [])}),
    strict(
        {
            "analysis": strict(
                {
                    "templates": several(strict({"templateName": TEXT})),
                    "args": several(
                        strict(
                            {
                                "name": TEXT,
                                "valueFrom": {
                                    "oneOf": [
                                        strict({"fieldRef": strict({"fieldPath": TEXT})}),
                                        strict({"podTemplateHashValue": {"enum": ["Latest", "Stable"]}}),
                                    ]
                                },
                            }
                        )
                    ),
                }
            )
        }
    ),
]
PEM = {"type": "string", "pattern": "^-----BEGIN PUBLIC KEY-----"}
SIGNING_KEY = strict({"publicKeys": PEM, "rekor": strict({"ignoreTlog": {"const": True}})})
# From the references of gateway.networking.k8s.io/v1, autoscaling.k8s.io/v1, ray.io/v1, argoproj.io/v1alpha1 and
# kyverno.io/v1: no CRD packaged for Python.
SCHEMAS: dict[str, Object] = {
    "RayJob": strict(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {},
            "metadata": METADATA,
            "spec": strict(
                {
                    "entrypoint": TEXT,
                    "submissionMode": {"enum": ["K8sJobMode", "HTTPMode"]},
                    "backoffLimit": {"type": "integer", "minimum": 0},
                    "activeDeadlineSeconds": SECONDS,
                    # Else ttlSecondsAfterFinished does nothing, and the Pods stay.
                    "shutdownAfterJobFinishes": {"const": True},
                    "ttlSecondsAfterFinished": SECONDS,
                    "rayClusterSpec": strict(
                        {
                            "headGroupSpec": strict(RAY_GROUP),
                            "workerGroupSpecs": several(
                                strict(
                                    RAY_GROUP
                                    | {"groupName": TEXT}
                                    | {name: {"type": "integer"} for name in ("replicas", "minReplicas", "maxReplicas")}
                                )
                            ),
                        }
                    ),
                }
            ),
        }
    ),
    "Gateway": strict(
        {
            "apiVersion": {"const": "gateway.networking.k8s.io/v1"},
            "kind": {},
            "metadata": METADATA,
            "spec": strict(
                {
                    "gatewayClassName": TEXT,
                    "listeners": several(
                        strict(
                            {
                                "name": TEXT,
                                "protocol": {"enum": ["HTTP", "HTTPS", "TLS", "TCP", "UDP"]},
                                "port": {"type": "integer", "minimum": 1, "maximum": 65535},
                                "hostname": TEXT,
                                "tls": strict(
                                    {
                                        "mode": {"enum": ["Terminate", "Passthrough"]},
                                        "certificateRefs": several(strict({"name": TEXT})),
                                    }
                                ),
                                "allowedRoutes": strict(
                                    {
                                        "kinds": several(strict({"kind": TEXT})),
                                        "namespaces": strict(
                                            {
                                                "from": {"enum": ["All", "Selector", "Same", "None"]},
                                                "selector": strict(
                                                    {
                                                        "matchExpressions": several(
                                                            strict(
                                                                {
                                                                    "key": TEXT,
                                                                    "operator": {
                                                                        "enum": [
                                                                            "In",
                                                                            "NotIn",
                                                                            "Exists",
                                                                            "DoesNotExist",
                                                                        ]
                                                                    },
                                                                    "values": several(TEXT),
                                                                }
                                                            )
                                                        )
                                                    }
                                                ),
                                            }
                                        ),
                                    }
                                ),
                            }
                        )
                    ),
                }
            ),
        }
    ),
    "Rollout": strict(
        {
            "apiVersion": {"const": "argoproj.io/v1alpha1"},
            "kind": {},
            "metadata": METADATA,
            "spec": strict(
                {
                    "selector": strict({"matchLabels": LABELS}),
                    "workloadRef": strict(
                        {
                            "apiVersion": {"const": "apps/v1"},
                            "kind": {"const": "Deployment"},
                            "name": TEXT,
                            "scaleDown": {"enum": ["never", "onsuccess", "progressively"]},
                        }
                    ),
                    "revisionHistoryLimit": SECONDS,
                    "progressDeadlineSeconds": SECONDS,
                    "progressDeadlineAbort": {"type": "boolean"},
                    "minReadySeconds": SECONDS,
                    "rollbackWindow": strict({"revisions": {"type": "integer", "minimum": 1}}),
                    "strategy": strict(
                        {
                            "canary": strict(
                                {
                                    "stableService": TEXT,
                                    "canaryService": TEXT,
                                    "trafficRouting": strict(
                                        {
                                            "plugins": strict(
                                                {
                                                    "argoproj-labs/gatewayAPI": strict(
                                                        {"httpRoute": TEXT, "namespace": TEXT}
                                                    )
                                                }
                                            )
                                        }
                                    ),
                                    # Each step is one thing.
                                    "steps": several({"oneOf": STEPS}),
                                }
                            )
                        }
                    ),
                }
            ),
        }
    ),
    "AnalysisTemplate": strict(
        {
            "apiVersion": {"const": "argoproj.io/v1alpha1"},
            "kind": {},
            "metadata": METADATA,
            "spec": strict(
                {
                    "args": several(strict({"name": TEXT})),
                    "metrics": several(
                        strict(
                            {
                                "name": TEXT,
                                "successCondition": TEXT,
                                "failureCondition": TEXT,
                                "provider": strict({"prometheus": strict({"address": TEXT, "query": TEXT})}),
                            },
                            ["name", "successCondition", "provider"],
                        )
                    ),
                }
            ),
        }
    ),
    "HTTPRoute": strict(
        {
            "apiVersion": {"const": "gateway.networking.k8s.io/v1"},
            "kind": {},
            "metadata": METADATA,
            "spec": strict(
                {
                    "parentRefs": several(strict({"name": TEXT, "namespace": TEXT, "sectionName": TEXT})),
                    "hostnames": several({"type": "string", "pattern": r"^(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)+$"}),
                    "rules": several(
                        strict(
                            {
                                "matches": several(
                                    strict(
                                        {
                                            "path": strict(
                                                {
                                                    "type": {"enum": ["Exact", "PathPrefix", "RegularExpression"]},
                                                    "value": {"type": "string", "pattern": "^/"},
                                                }
                                            )
                                        }
                                    )
                                ),
                                "backendRefs": several(
                                    strict(
                                        {
                                            "name": TEXT,
                                            "port": {"type": "integer", "minimum": 1, "maximum": 65535},
                                            "weight": {"type": "integer", "minimum": 0, "maximum": 1_000_000},
                                        }
                                    )
                                ),
                            }
                        )
                    ),
                }
            ),
        }
    ),
    "Policy": strict(
        {
            "apiVersion": {"const": "kyverno.io/v1"},
            "kind": {},
            "metadata": METADATA,
            "spec": strict(
                {
                    "background": {"const": False},
                    "webhookConfiguration": strict({"failurePolicy": {"const": "Fail"}, "timeoutSeconds": SECONDS}),
                    "rules": several(
                        strict(
                            {
                                "name": TEXT,
                                "match": strict(
                                    {"any": several(strict({"resources": strict({"kinds": several(TEXT)})}))}
                                ),
                                "verifyImages": several(
                                    strict(
                                        {
                                            "imageReferences": several(TEXT),
                                            "failureAction": {"const": "Enforce"},
                                            "required": {"const": True},
                                            "verifyDigest": {"const": True},
                                            "mutateDigest": {"const": False},
                                            "attestors": several(
                                                strict({"entries": several(strict({"keys": SIGNING_KEY}))})
                                            ),
                                        }
                                    )
                                ),
                            }
                        )
                    ),
                }
            ),
        }
    ),
    "GRPCRoute": strict(
        {
            "apiVersion": {"const": "gateway.networking.k8s.io/v1"},
            "kind": {},
            "metadata": METADATA,
            "spec": strict(
                {
                    "parentRefs": several(strict({"name": TEXT, "namespace": TEXT, "sectionName": TEXT}, ["name"])),
                    "rules": several(
                        strict(
                            {
                                "matches": several(strict({"method": strict({"service": TEXT})})),
                                "backendRefs": several(
                                    strict({"name": TEXT, "port": {"type": "integer", "minimum": 1, "maximum": 65535}})
                                ),
                            }
                        )
                    ),
                }
            ),
        }
    ),
    "VerticalPodAutoscaler": strict(
        {
            "apiVersion": {"const": "autoscaling.k8s.io/v1"},
            "kind": {},
            "metadata": METADATA,
            "spec": strict(
                {
                    "targetRef": strict({"apiVersion": TEXT, "kind": TEXT, "name": TEXT}),
                    # Only recommends: any other mode restarts Pods.
                    "updatePolicy": strict({"updateMode": {"const": "Off"}}),
                    "resourcePolicy": strict(
                        {
                            "containerPolicies": several(
                                strict(
                                    {
                                        "containerName": TEXT,
                                        "controlledResources": several({"enum": ["cpu", "memory"]}),
                                    }
                                )
                            )
                        }
                    ),
                }
            ),
        }
    ),
}
