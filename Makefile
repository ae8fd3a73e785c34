# `make help` lists the targets. Everything runs in a virtual environment of its own, .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DATA ?= data

.DEFAULT_GOAL := help
.PHONY: help run test test-ray test-sign test-train test-page check soak fuzz bench load profile gpu-check lint format rename lock \
	stubs sbom licences audit artifact-cuda image-cpu image-gpu image-scoring image-scoring-gpu image-fetch image-train image-model \
	base-digests release image-tools image-test clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/cpu: docker/requirements-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes -r docker/requirements-cpu.txt
	@touch $@

$(VENV)/dev: docker/requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes -r docker/requirements-dev.txt
	@touch $(VENV)/cpu $@

$(VENV)/fuzz: docker/requirements-fuzz.txt $(VENV)/dev
	$(PIP) install --require-hashes -r docker/requirements-fuzz.txt
	@touch $@

$(VENV)/page: docker/requirements-page.txt $(VENV)/dev
	$(PIP) install --require-hashes -r docker/requirements-page.txt
	@touch $@

# Ray is large and wants versions of its own, so it is beside everything else.
.venv-ray/ready: docker/requirements-ray.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r $<
	@touch $@

# The official tool of OpenSSF Model Signing brings all of Sigstore, so it is beside everything else too. --no-deps: the lock
# has all, and pip would not take its pydantic for the one with an extra that Sigstore asks for.
.venv-sign/ready: docker/requirements-sign-test.txt
	$(PYTHON) -m venv .venv-sign
	.venv-sign/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --require-hashes -r $<
	@touch $@

.venv-supply/ready: docker/requirements-supply.txt
	$(PYTHON) -m venv .venv-supply
	.venv-supply/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r $<
	@touch $@

# PyTorch, which no lock has: the CPU build where pip finds one of this version, else CUDA's, which is gigabytes.
TORCH ?= torch==2.13.0
TRAIN := .venv-train
$(TRAIN)/train: docker/requirements-train-test.txt
	$(PYTHON) -m venv $(TRAIN)
	$(TRAIN)/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r $<
	$(TRAIN)/bin/python -m pip --disable-pip-version-check --quiet install '$(TORCH)'
	@touch $@

run: $(VENV)/cpu ## serve the bundled model on :8000
	$(BIN)/python -m app

# Two at a time, a file to each, because fixtures belong to files. What measures is not among them: it has `soak`.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/dev ## install what the tests need, then run the whole suite
	$(PYTEST) $(ARGS)

test-ray: .venv-ray/ready ## app.scoring on a Ray cluster of two node processes, in an environment of its own
	.venv-ray/bin/python -m pytest tests/ray $(ARGS)

test-page: $(VENV)/page ## the page and /docs in Chromium (apt-get install chromium chromium-driver): axe, policy, hosts asked
	$(BIN)/python -m pytest tests/page $(ARGS)

test-sign: .venv-sign/ready ## signatures: the official tool takes ours, and we take its (in an environment of its own)
	.venv-sign/bin/python -m pytest tests/sign $(ARGS)

check: lint ## what to run while you work: lint, types, layers and the fast tests, under a minute
	$(PYTEST) --quiet tests/unit $(ARGS)

test-train: $(TRAIN)/train ## training: killed, resumed, on two processes, tracked, published (in .venv-train, with PyTorch)
	$(TRAIN)/bin/python -m pytest -n 2 --dist loadfile tests/train $(ARGS)

soak: $(VENV)/dev ## 100,000 requests of mixed lengths, a minute at 5 x capacity, hostile clients, 50 kills of app.scoring, 10,000 jobs, 500 corruptions
	$(BIN)/python -m pytest -m soak --soak-requests 100000 --overload-seconds 60 -s $(ARGS)
	$(BIN)/python -m pytest tests/server/test_hostile_clients.py --live-within-seconds 0.5 $(ARGS)
	$(BIN)/python -m pytest tests/server/test_scoring.py -k killed --scoring-kills 50 $(ARGS)
	$(BIN)/python -m pytest tests/server/test_jobs.py -k killed --jobs 10000 $(ARGS)
	$(BIN)/python -m pytest tests/unit/artifact/test_signature.py -k corrupted --corruptions 500 $(ARGS)

# For all targets of tests/fuzz together.
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/fuzz ## broken requests, tensors, texts and manifests until one breaks something (FUZZ_SECONDS=60)
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(ARGS)

lint: $(VENV)/dev ## style, types, layers, Dockerfiles, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/shellcheck docker/*.sh .ci/run

format: $(VENV)/dev ## rewrite files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev ## this server beside its ceiling, its floor and a plain script, in one run (about 4 minutes)
	$(BIN)/python -m loadtest.benchmark

OUT ?= capacity
load: $(VENV)/dev ## what the replica on :8000 carries, the autoscaling target that follows, and its proof (under 10 minutes)
	$(BIN)/python -m loadtest.capacity --out $(OUT) $(ARGS)
	$(BIN)/python -m loadtest.simulate $(OUT)/report.json --out $(OUT)/simulation

profile: $(VENV)/dev ## where the CPU time of one request goes
	$(BIN)/python -m loadtest.benchmark.budget

# In an environment that has the gpu extra, which conflicts with what the others install.
gpu-check: ## what a GPU gives this server, in 8 minutes, with PYTHON as it is (ARGS="--artifact DIR")
	$(PYTHON) -m loadtest.benchmark.gpu_check $(ARGS)

artifact-cuda: $(VENV)/dev ## derive the fp16 artifact for CUDA from the committed weights
	$(BIN)/python -m model.training.export --artifact model/sentiment --precision fp16 --out artifacts/sentiment-cuda

# The starter's name, which is also the image's, and NAME in its place. Names made from it, such as
# NAME-loadtest-worker, must fit into the 63 characters that Kubernetes allows.
PROJECT := $(shell awk -F '"' '/^name = /{print $$2; exit}' pyproject.toml)
RENAMABLE := ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$$

rename: new-name $(VENV)/dev ## the whole starter under another name, such as NAME=fraud-scoring; needs a clean working tree
	@# Where it has underscores or spaces for hyphens, so has the new one. No binary file has it.
	git grep -zlIiE '$(subst -,[-_ ],$(PROJECT))' | xargs -0 perl -pi -e \
		's/$(subst -,[-_ ],$(PROJECT))/$$& =~ m{([_ ])} ? "$(NAME)" =~ s{-}{$$1}gr : "$(NAME)"/gie'
	@# Comments changed in the lock files, not what they lock.
	@touch -c $(VENV)/cpu $(VENV)/dev
	@$(BIN)/ruff format --quiet .
	@git diff --shortstat

.PHONY: new-name
new-name:
	@printf '%s\n' "$$NAME" | LC_ALL=C grep -Eq '$(RENAMABLE)' || { echo "NAME='$$NAME' will not do for a name:" \
		"1 to 40 lower-case letters, digits and hyphens, first a letter and last no hyphen" >&2; exit 2; }
	@[ -z "$$(git status --porcelain)" ] || { echo "commit or stash what git status shows:" \
		"then git diff is the rename alone, and git restore . undoes it" >&2; exit 2; }

VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' app/__init__.py)
IMAGE ?= $(PROJECT)
# The artifact that goes into images and releases: the one that the server takes by itself.
MODEL ?= $(shell awk -F '"' '/ model_dir: Path/{print $$2; exit}' app/settings.py)
# Where there is no image registry: a base from Debian's packages, built without a container engine's network.
TEST_BASE := localhost/debian-python:trixie
TEST_IMAGE := localhost/$(PROJECT):test
TEST_MODEL := artifacts/test-model

# With SBOM=1 an image's build also writes what the image holds to sbom/, and that file's digest into a label of the image.
IMAGES := cpu gpu scoring scoring-gpu fetch train
ifdef SBOM
$(IMAGES:%=image-%): image-%: sbom-%
$(IMAGES:%=image-%): override export SBOM = sbom/$(@:image-%=%).cdx.json
endif

image-cpu: ## the CPU server's image with the artifact MODEL=DIR, with docker, podman or buildah (BUILDER=, PLATFORM=, PUSH=1)
	RECORD=SERVER_IMAGE sh docker/build.sh cpu $(IMAGE):$(VERSION) "$(MODEL)"

image-gpu: ## the CUDA server's image with the artifact MODEL=DIR, best an fp16 one; fetches about 2 GB
	RECORD=GPU_SERVER_IMAGE sh docker/build.sh gpu $(IMAGE)-gpu:$(VERSION) "$(MODEL)"

image-scoring: ## the CPU image that also has app.scoring's extra: data sets on disk and in object storage, with MODEL=DIR
	RECORD=SCORING_IMAGE EXTRAS=scoring sh docker/build.sh cpu $(IMAGE)-scoring:$(VERSION) "$(MODEL)"

image-scoring-gpu: ## the same for CUDA
	RECORD=GPU_SCORING_IMAGE EXTRAS=scoring sh docker/build.sh gpu $(IMAGE)-scoring-gpu:$(VERSION) "$(MODEL)"

image-fetch: ## the image of model.fetch, for init containers
	RECORD=FETCH_IMAGE sh docker/build.sh fetch $(IMAGE)-fetch:$(VERSION)

image-train: ## the image that trains, compares and publishes; TORCH=torch==2.13.0+cpu for CPUs, else CUDA's build
	BUILD_FLAGS="--build-arg TORCH=$(TORCH) $(BUILD_FLAGS)" RECORD=TRAIN_IMAGE sh docker/build.sh train $(IMAGE)-train:$(VERSION)

image-model: ## the artifact MODEL=DIR as an image of its own, for components/model-image-volume; its tag is VERSION-DIGEST
	RECORD=MODEL_IMAGE sh docker/build.sh model $(IMAGE)-model "$(MODEL)"

base-digests: ## pin what images are built on: asks the registry for the digest, writes it to docker/bases.env
	sh docker/base-digests.sh

# What each image's Python packages are locked to: all that pip installs in it, but PyTorch.
LOCKS_cpu = cpu queue sign tracing $(EXTRAS)
LOCKS_gpu = gpu queue sign tracing $(EXTRAS)
LOCKS_scoring = $(LOCKS_cpu) scoring
LOCKS_scoring-gpu = $(LOCKS_gpu) scoring
LOCKS_fetch := fetch
LOCKS_train := train
LOCK_FILES = $(patsubst %,docker/requirements-%.txt,$(LOCKS_$(1)))
# Of the artifact, where its manifest's lineage has no `license`.
MODEL_LICENCE ?= Apache-2.0

sbom: .venv-supply/ready $(VENV)/dev $(IMAGES:%=sbom-%) ## what each image holds by its lock files, and the model MODEL=DIR, as CycloneDX in sbom/
	.venv-supply/bin/python docker/check_sbom.py sbom/*.cdx.json

sbom-%: .venv-supply/ready $(VENV)/dev
	@mkdir -p sbom
	@# Two lock files may have a package in common, of one version.
	awk '/^[[:alnum:]]/{new = !seen[$$1]++} new' $(call LOCK_FILES,$*) \
		| .venv-supply/bin/python -W ignore -m cyclonedx_py requirements - --pyproject pyproject.toml \
		--mc-type application --spec-version 1.6 --output-reproducible --output-file sbom/$*.cdx.json
	@# The servers' images have the model in them.
	$(if $(filter cpu gpu scoring scoring-gpu,$*),$(BIN)/python -m model.bom "$(MODEL)" --licence $(MODEL_LICENCE) --into sbom/$*.cdx.json)

licences: $(VENV)/dev ## the licence of each dependency of the images, held to those that are allowed (docker/licences.py)
	$(BIN)/python docker/licences.py $(sort $(foreach image,$(IMAGES),$(call LOCK_FILES,$(image))))

audit: .venv-supply/ready ## known vulnerabilities in what the images are locked to, or that no database was reached (exit code 2)
	.venv-supply/bin/python docker/audit.py $(sort $(foreach image,$(IMAGES),$(call LOCK_FILES,$(image))))

release: $(VENV)/cpu ## k8s/ releases this server with the artifact MODEL=DIR, after the gate (FOR=gpu|canary, IMAGES=FILE)
	$(BIN)/python -m model.release "$(MODEL)" $(if $(FOR),--for $(FOR)) $(if $(IMAGES),--images $(IMAGES)) $(ARGS)

image-tools: ## install what image-test needs, from Debian's packages (as root)
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends buildah podman runc debootstrap git

TEST_BUILD = BUILDER=buildah BUILD_FLAGS="--isolation=chroot --network=host --build-arg BASE=$(TEST_BASE)$(1) $(2)" \
	sh docker/build.sh cpu $(TEST_IMAGE)$(1) $(TEST_MODEL)$(1)
image-test: $(VENV)/dev .venv-supply/ready ## build the CPU image twice on Debian bases with buildah and run it with podman (as root)
	buildah inspect $(TEST_BASE) >/dev/null 2>&1 || sh docker/debian-base.sh $(TEST_BASE)
	buildah rmi $(TEST_IMAGE) $(TEST_IMAGE)-again >/dev/null 2>&1 || true
	$(BIN)/python -m tests.text_model $(TEST_MODEL)
	$(MAKE) --no-print-directory sbom-cpu MODEL=$(TEST_MODEL)
	SBOM=sbom/cpu.cdx.json $(call TEST_BUILD)
	.venv-supply/bin/python docker/check_sbom.py sbom/cpu.cdx.json
	@# Again, on a base of the same content with a digest of its own, from other permissions, and with nothing from the cache.
	rm -rf $(TEST_MODEL)-again && cp -r $(TEST_MODEL) $(TEST_MODEL)-again && chmod -R go= $(TEST_MODEL)-again
	container=$$(buildah from $(TEST_BASE)) && buildah config --label again=true $$container \
		&& buildah commit --quiet --rm $$container $(TEST_BASE)-again
	$(call TEST_BUILD,-again,--no-cache)
	TEST_IMAGE=$(TEST_IMAGE) $(BIN)/python -m pytest tests/deploy/test_images.py $(ARGS)

# Without UPGRADE, pins that still fit stay: for a dependency that is added.
UPGRADE ?= --upgrade
LOCK := pip-compile --quiet $(UPGRADE) --strip-extras --allow-unsafe --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host
LESS_TORCH := --no-allow-unsafe --unsafe-package torch --constraint $(TRAIN)/torch.txt
# With the pins of what an extra shares an image with: pip takes no two versions.
IN_ONE_IMAGE := --constraint docker/requirements-cpu.txt --constraint docker/requirements-scoring.txt
# An extra alone, without what the server needs.
PROJECT_EXTRAS := tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
EXTRA := $(BIN)/python -c 'import sys, tomllib; print(*$(PROJECT_EXTRAS)[sys.argv[1]], sep="\n")'

lock: $(VENV)/dev ## pin dependencies anew, by hash and without index addresses; UPGRADE= keeps the pins there are
	$(PIP) install pip-tools
	$(BIN)/$(LOCK) pyproject.toml --extra cpu -o docker/requirements-cpu.txt
	$(BIN)/$(LOCK) pyproject.toml --extra gpu -o docker/requirements-gpu.txt
	$(BIN)/$(LOCK) pyproject.toml --extra cpu --extra fetch --extra grpc --extra queue --extra scoring --extra tracing --extra dev -o docker/requirements-dev.txt
	$(EXTRA) fetch | $(BIN)/$(LOCK) - -o docker/requirements-fetch.txt
	$(EXTRA) image | $(BIN)/$(LOCK) - -o docker/requirements-image.txt
	@# Of the CPU build, whose dependencies are those of any: CUDA's has its libraries beside, each pinned by PyTorch.
	mkdir -p $(TRAIN) && echo '$(TORCH:+cpu=)+cpu' >$(TRAIN)/torch.txt
	$(EXTRA) train | $(BIN)/$(LOCK) $(LESS_TORCH) - -o docker/requirements-train.txt
	$(BIN)/$(LOCK) $(LESS_TORCH) pyproject.toml --extra cpu --extra queue --extra train --extra train-test -o docker/requirements-train-test.txt
	$(EXTRA) queue | $(BIN)/$(LOCK) - -o docker/requirements-queue.txt
	$(EXTRA) sign | $(BIN)/$(LOCK) - -o docker/requirements-sign.txt
	$(BIN)/$(LOCK) pyproject.toml --extra cpu --extra queue --extra sign --extra sign-test -o docker/requirements-sign-test.txt
	$(EXTRA) scoring | $(BIN)/$(LOCK) - -o docker/requirements-scoring.txt
	$(EXTRA) tracing | $(BIN)/$(LOCK) $(IN_ONE_IMAGE) - -o docker/requirements-tracing.txt
	$(EXTRA) grpc | $(BIN)/$(LOCK) $(IN_ONE_IMAGE) - -o docker/requirements-grpc.txt
	$(BIN)/$(LOCK) pyproject.toml --extra cpu --extra scoring --extra ray --extra dev -o docker/requirements-ray.txt
	$(EXTRA) supply | $(BIN)/$(LOCK) - -o docker/requirements-supply.txt
	$(EXTRA) fuzz | $(BIN)/$(LOCK) - -o docker/requirements-fuzz.txt
	$(EXTRA) page | $(BIN)/$(LOCK) --constraint docker/requirements-dev.txt - -o docker/requirements-page.txt

PROTO := app/grpc/protocol/open_inference.proto
stubs: $(VENV)/dev ## Python of the gRPC protocol's definition, app/grpc/protocol
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. $(PROTO)

clean: ## remove what the other targets made
	rm -rf $(VENV) .venv-ray .venv-sign .venv-supply sbom $(TRAIN) artifacts .mypy_cache .ruff_cache .pytest_cache .hypothesis
