# make run     serve with the shipped config.toml
# make test    run the tests. PYTHON=python3.13 chooses the Python, WORKERS=1 the number of tests at a time (default:
#              three times the number of cores, because many tests wait); DEEP=1 tries each property with four times
#              as many examples, as CI does once. What takes long has targets of its own:
# make slow-test      the slowest of the tests
# make console-test   test the console in a real browser (chromium)
# make install-test   test make install and make uninstall, with packages from PyPI
# make fuzz-api       send a daemon what a fuzzer makes of its OpenAPI document
# make test-newest   the same tests with the newest version of each library, instead of those in constraints.txt;
#              `NEWEST=1 bash .ci/run` does it too, as its last step. make constraints: renew constraints.txt
# make check   what CI runs: ruff, mypy --strict, all these tests, the documents' site, generated clients, the short
#              form of the fault suite, and the service on a systemd
# make docs    the documents as a site, in build/docs/site; fails if a link leads nowhere. docs-test: test that it does
# make clients generate clients from the OpenAPI document and use them; the generators come from PyPI and npm
# make faults  the whole fault suite: kills, clocks, hostile operators, disks, storms (docs/reliability.md)
# make service-test   the service on a real systemd, of Debian 12 and of 13; SUITE=trixie chooses one. Needs root,
#              debootstrap and systemd-container; without them the tests are skipped with the reason
# make fuzz    coverage-guided fuzzing of the parsers, for SECONDS=60
# make bench   what lmdaemon costs, compared with floors and peers (docs/performance.md). ONLY=touch,bulk: some figures;
#              AGAINST=DIR: compare with another checkout instead of the floors. bench-quick: few and short
#              measurements; bench-growth: costs as the tables grow
# make demo    a daemon, an operator that goes down and comes back, and 200 made-up players, on this machine
# make night SITUATION=slow   play a situation of a night on call and open a shell in it (docs/operating.md, "The
#              night's questions"). Without SITUATION: list them
# make manual  renew docs/check.md from the checks; make runbook: the console's runbook from docs/operating.md;
#              make screenshots: the pictures of docs/console.md
# make clean   remove what these commands made
# make install, make uninstall   the service for systemd, in PREFIX=/opt/lmdaemon; also DESTDIR, BINDIR, PYTHON, EXTRAS
# make deb     the same as a Debian package, in dist/

PYTHON ?= python3
# Each PYTHON that is named gets a virtual environment of its own, because packages are installed for one Python.
VENV := .venv$(if $(filter file,$(origin PYTHON)),,-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
BIN := $(VENV)/bin
BENCH_VENV := build/bench/venv$(VENV:.venv%=%)
NEWEST_VENV := build/newest/venv$(VENV:.venv%=%)
# Installs the versions with which everything was tested, so that a new release of a library changes nothing here.
PIP = python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DOCS_VENV := build/docs/venv$(VENV:.venv%=%)
PREFIX ?= /opt/lmdaemon
BINDIR ?= /usr/local/bin
# The service's user must be able to read the Python. The first Python on root's path may be readable for root alone.
SERVICE_PYTHON = $(if $(filter file,$(origin PYTHON)),/usr/bin/python3,$(PYTHON))
LAYOUT = PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' BINDIR='$(BINDIR)' PYTHON='$(SERVICE_PYTHON)' EXTRAS='$(EXTRAS)'
# Tests run side by side. Their files are in memory if that is large enough, because syncing them to a disk takes longer
# than everything else. How the daemon copes with disks is tested by the fault suite, on a real disk.
CORES := $(shell getconf _NPROCESSORS_ONLN)
WORKERS ?= $(shell expr $(CORES) \* 3)
PARALLEL = --numprocesses=$(WORKERS)
# Bytecode is kept. Otherwise each worker would compile every test again, and each daemon its own modules.
unexport PYTHONDONTWRITEBYTECODE
IN_MEMORY = $(shell test -w /dev/shm && df -Pk /dev/shm | awk 'NR == 2 && $$4 > 1000000 {print "PYTEST_DEBUG_TEMPROOT=/dev/shm"}')

.PHONY: run demo night test slow-test console-test install-test fuzz-api test-newest runbook screenshots constraints \
	docs docs-test clients faults faults-short service-test fuzz bench bench-quick bench-growth check lint types \
	manual install uninstall deb clean

run: $(VENV)/.run
	$(BIN)/lmdaemon --config config.toml serve

demo: $(VENV)/.run
	$(BIN)/$(PIP) --editable '.[workbench]'
	LMDAEMON=$(BIN)/lmdaemon sh docs/examples/demo.sh

night: $(VENV)/.test
	@PYTHONPATH=tests/helpers $(BIN)/python tests/night $(SITUATION)

test: $(VENV)/.test
	$(IN_MEMORY) $(BIN)/python -m pytest $(PARALLEL) --ignore=tests/faults --ignore=tests/service $(ARGS)

# Some of these, and those in a browser, keep a core busy each.
slow-test: $(VENV)/.test
	$(IN_MEMORY) $(BIN)/python -m pytest -m slow --numprocesses=$(CORES) \
	  $$(grep -rl --include='test_*.py' 'pytest.mark.slow' tests) $(ARGS)

console-test: $(VENV)/.test
	$(IN_MEMORY) $(BIN)/python -m pytest -m browser --numprocesses=$(CORES) tests/web/test_console*.py $(ARGS)

install-test: $(VENV)/.test
	$(IN_MEMORY) $(BIN)/python -m pytest -m install tests/project/test_install.py $(ARGS)

fuzz-api: $(VENV)/.test
	$(IN_MEMORY) $(BIN)/python -m pytest -m fuzzer tests/web/test_openapi.py $(ARGS)

docs: $(DOCS_VENV)/.ready
	$(DOCS_VENV)/bin/sphinx-build -q -W --keep-going -c docs/site -d build/docs/cache . build/docs/site

docs-test: $(VENV)/.test
	$(BIN)/python -m pytest -m site tests/project/test_site.py $(ARGS)

# The environment is made anew each time. Versions that differ from constraints.txt are shown before the tests run.
test-newest:
	rm -rf $(NEWEST_VENV)
	$(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --editable '.[fast,test]'
	-$(NEWEST_VENV)/bin/python -m pip freeze --exclude-editable | diff --suppress-common-lines constraints.txt - | grep '^>'
	$(IN_MEMORY) NEWEST=1 $(NEWEST_VENV)/bin/python -m pytest -m 'not clients and not install and not site' $(PARALLEL) \
	  --ignore=tests/faults --ignore=tests/service $(ARGS)

# Renews the runbook that the console shows, after a change of docs/operating.md.
runbook:
	$(PYTHON) tests/helpers/runbook.py

# Makes the pictures of docs/console.md in a browser (chromium), from the pages that the tests use.
SHOWN = overview operator delivery-dark dialog operator-400
screenshots: $(VENV)/.test
	rm -rf build/pictures && mkdir -p build/pictures docs/console
	PICTURES=$(CURDIR)/build/pictures $(BIN)/python -m pytest -q -m browser tests/web/test_console_pictures.py -k never_seen
	for name in $(SHOWN); do cp build/pictures/$$name.png docs/console/; done

# Renews constraints.txt with today's versions. Commit it once everything was tested with them.
constraints:
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --disable-pip-version-check '.[fast,postgres,completion,man,workbench,test,lint]'
	grep '^#' constraints.txt >build/constraints.txt
	build/constraints/bin/python -m pip freeze --all | grep -v '^lmdaemon\|^pip==' >>build/constraints.txt
	mv build/constraints.txt constraints.txt

clients: $(VENV)/.test
	$(BIN)/python -m pytest -m clients tests/web/test_generated_clients.py tests/daemon/test_game_server.py $(ARGS)

faults: $(VENV)/.test
	FAULTS=full $(BIN)/python -m pytest tests/faults tests/daemon/test_promises.py tests/web/test_doors.py $(ARGS)

# Two tests at a time, because most of them wait. `make faults` runs one at a time, because it measures.
faults-short: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses=2 tests/faults $(ARGS)

service-test: $(VENV)/.test
	$(BIN)/python -m pytest tests/service $(ARGS)

fuzz: $(VENV)/.test
	$(BIN)/$(PIP) --editable '.[fuzz]'
	$(BIN)/python tests/fuzz_parsers.py -max_total_time=$(or $(SECONDS),60) -max_len=2048

BENCH = $(BENCH_VENV)/bin/python -m benchmarks --loop $(or $(LOOP),uvloop) $(if $(ONLY),--only $(ONLY)) \
	$(if $(AGAINST),--against $(AGAINST)) $(ARGS)

bench: $(BENCH_VENV)/.ready build/bench/.peers
	$(BENCH)

bench-quick: $(BENCH_VENV)/.ready
	$(BENCH) --quick

bench-growth: $(BENCH_VENV)/.ready
	$(BENCH_VENV)/bin/$(PIP) --editable '.[plot]'
	$(BENCH_VENV)/bin/python -m benchmarks.growth $(ARGS)

# The last five wait for other programs most of the time, so they run two at a time.
check: lint types test slow-test console-test fuzz-api
	$(MAKE) --jobs=2 --output-sync=target docs-test clients install-test
	$(MAKE) --jobs=2 --output-sync=target faults-short service-test

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

manual: $(VENV)/.run
	$(BIN)/python -c 'from lmdaemon.workbench.manual import check_page; print(check_page(), end="")' >docs/check.md

install uninstall:
	@$(LAYOUT) sh systemd/install.sh $@

deb:
	@PYTHON='$(SERVICE_PYTHON)' EXTRAS='$(EXTRAS)' sh systemd/deb/build.sh

clean:
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A stamp file marks each finished installation. So a second `make run` starts at once, and after a change of
# pyproject.toml everything is installed again.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lmdaemon needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/$(PIP) --editable '.[test,lint]'
	touch $@

# An environment of its own for the generator of the site, which lmdaemon itself does not need.
$(DOCS_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

# The benchmarks' environment, apart from the others because its packages are only there to be measured.
$(BENCH_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/$(PIP) --editable '.[fast,bench]'
	touch $@

# Debian's Redis and webdis, if they can be installed. RUNLEVEL keeps them from being started as services.
build/bench/.peers:
	mkdir -p build/bench
	-test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || command -v webdis >/dev/null || { apt-get update -qq && \
	  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends redis-server webdis >/dev/null; }
	touch $@
