# make             builds bin/particle and its other names
# make install     into $(DESTDIR)$(PREFIX)
# sudo make demo   sets up what is missing and does the main job end to end
# sudo make test   sets up what is missing and runs all tests
# make test-unit   the tests that need neither root nor other programs
# sudo make bench  Particle and its peers on the same input; BENCHFLAGS='-n 9 -json FILE'
# make fuzz        each fuzz target for FUZZTIME
# make clean

PREFIX   ?= /usr/local
FUZZTIME ?= 60s

# sudo drops /usr/local/go/bin from PATH on Debian.
GO ?= $(firstword $(shell command -v go 2>/dev/null) $(wildcard /usr/local/go/bin/go) go)
export GO

# mount.composefs is looked up by mount(8) in /sbin.
TOOLS := mkcomposefs composefs-info mount.composefs

.PHONY: all
all: $(TOOLS:%=bin/%)

# The go command knows best what is out of date.
.PHONY: bin/particle
bin/particle:
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./cmd/particle

$(TOOLS:%=bin/%): bin/%: bin/particle
	ln -sf particle $@

.PHONY: install
install: all
	install -D -m 755 bin/particle $(DESTDIR)$(PREFIX)/bin/particle
	ln -sf particle $(DESTDIR)$(PREFIX)/bin/mkcomposefs
	ln -sf particle $(DESTDIR)$(PREFIX)/bin/composefs-info
	mkdir -p $(DESTDIR)$(PREFIX)/sbin
	ln -sf ../bin/particle $(DESTDIR)$(PREFIX)/sbin/mount.composefs

.PHONY: demo
demo: root all
	tests/demo/demo.sh

.PHONY: test
test: root all
	tests/setup/test.sh

.PHONY: test-unit
test-unit:
	$(GO) vet ./...
	$(GO) test -short ./...

.PHONY: bench
bench: root all
	. $$(tests/setup/setup.sh | tail -n 1) && $(GO) run ./tests/bench $(BENCHFLAGS)

.PHONY: fuzz
fuzz:
	tests/setup/fuzz.sh $(FUZZTIME)

.PHONY: clean
clean:
	rm -rf bin

.PHONY: root
root:
	@[ "$$(id -u)" = 0 ] || { echo "this needs root: sudo make $(MAKECMDGOALS)" >&2; exit 1; }
