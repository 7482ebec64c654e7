# One word each; `make` alone lints and tests. shell/test.sh does the work, so a machine without make has all of it too.

TEST = sh shell/test.sh
VENV = .venv
UV = uv
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.8 --no-python-downloads --generate-hashes \
	--custom-compile-command "make lock" $(UPGRADE)

all:
	$(TEST)

lint:
	$(TEST) lint

test:
	$(TEST) tests pythons

types:
	$(TEST) types

shell:
	$(TEST) shell

docs:
	$(TEST) tests -- -k "docs or readme"

# Wheel and sdist; the wheel is the same bytes for the same commit.
package: $(VENV)
	rm -rf build dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(VENV)/bin/python -m build --no-isolation --outdir dist .

# The man pages, docs/cli.md and the completions, from the tables of the programs.
man: $(VENV)
	$(VENV)/bin/python docs/make_man.py

bench: $(VENV)
	@for script in bench/*.py; do \
		[ -e "$$script" ] || continue; \
		echo "== $$script"; $(VENV)/bin/python "$$script" || exit 1; \
	done

cover: $(VENV)
	$(VENV)/bin/python -m coverage run -m pytest -m "not lab"
	$(VENV)/bin/python -m coverage report

# `make lock` keeps the pins that still fit setup.cfg; `make lock UPGRADE=--upgrade` takes the newest.
lock:
	@command -v $(UV) >/dev/null || { echo "make lock needs uv: install it, or name it with UV=/path/to/uv" >&2; exit 1; }
	$(COMPILE) --extra server setup.cfg requirements/build.in -o requirements/server.txt
	$(COMPILE) --extra all --constraint requirements/server.txt setup.cfg requirements/test.in -o requirements/test.txt
	rm -rf *.egg-info

demo:
	sh shell/quickstart.sh --demo

clean:
	rm -rf build dist *.egg-info .venv .venv-* .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV):
	$(TEST) venv

.PHONY: all lint test types shell docs package man bench cover lock demo clean $(VENV)
