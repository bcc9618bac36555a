# make             builds bin/particle and its other names, and bin/particle-init-root
# make install     into $(DESTDIR)$(PREFIX); with PREFIX=/usr also what boots a host
# make deb         dist/particle_VERSION_ARCH.deb (docs/packaging.md)
# sudo make demo   sets up what is missing and does the main job end to end
# sudo make test   sets up what is missing and runs all tests
# sudo make test-boot   boots virtual machines: every loader, upgrades, fall back, tampering
# sudo make test-crash  the crash matrix: an upgrade cut off at many moments (an hour)
# make test-unit   the tests that need neither root nor other programs
# sudo make bench  Particle and its peers on the same input; BENCHFLAGS='-n 9 -json FILE'
# make fuzz        each fuzz target for FUZZTIME
# make clean

PREFIX   ?= /usr/local
FUZZTIME ?= 60s

# sudo drops /usr/local/go/bin from PATH on Debian.
GO ?= $(firstword $(shell command -v go 2>/dev/null) $(wildcard /usr/local/go/bin/go) go)
export GO

# Where binaries are built, and what else the linker is told.
BIN     ?= bin
LDFLAGS ?=

# mount.composefs is looked up by mount(8) in /sbin.
TOOLS := mkcomposefs composefs-info mount.composefs

.PHONY: all
all: $(TOOLS:%=$(BIN)/%) $(BIN)/particle-init-root

# The go command knows best what is out of date.
.PHONY: $(BIN)/particle $(BIN)/particle-init-root
$(BIN)/particle $(BIN)/particle-init-root: $(BIN)/%:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/$*

$(TOOLS:%=$(BIN)/%): $(BIN)/%: $(BIN)/particle
	ln -sf particle $@

# The date and the release at the foot of the manual pages.
SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),0)
RELEASE           ?=
# Where the other names go, and the shells' completions.
TOOLDIR  ?= $(PREFIX)/bin
MOUNTDIR ?= $(PREFIX)/sbin
BASHDIR  ?= $(PREFIX)/share/bash-completion/completions
ZSHDIR   ?= $(PREFIX)/share/zsh/$(if $(filter /usr,$(PREFIX)),vendor-completions,site-functions)
FISHDIR  ?= $(PREFIX)/share/fish/vendor_completions.d
UNITDIR  ?= $(PREFIX)/lib/systemd/system

# Built for this machine whatever GOARCH is: it writes manuals and completions.
DOCS = GOOS= GOARCH= $(GO) run -trimpath ./cmd/particle docs

.PHONY: install
install: all
	install -D -m 755 $(BIN)/particle $(DESTDIR)$(PREFIX)/bin/particle
	mkdir -p $(DESTDIR)$(TOOLDIR) $(DESTDIR)$(MOUNTDIR)
	ln -sfr $(DESTDIR)$(PREFIX)/bin/particle $(DESTDIR)$(TOOLDIR)/mkcomposefs
	ln -sfr $(DESTDIR)$(PREFIX)/bin/particle $(DESTDIR)$(TOOLDIR)/composefs-info
	ln -sfr $(DESTDIR)$(PREFIX)/bin/particle $(DESTDIR)$(MOUNTDIR)/mount.composefs
	$(DOCS) man --release '$(RELEASE)' --epoch $(SOURCE_DATE_EPOCH) $(DESTDIR)$(PREFIX)/share/man/man8
	mkdir -p $(DESTDIR)$(BASHDIR) $(DESTDIR)$(ZSHDIR) $(DESTDIR)$(FISHDIR)
	$(DOCS) completion bash >$(DESTDIR)$(BASHDIR)/particle
	$(DOCS) completion zsh >$(DESTDIR)$(ZSHDIR)/_particle
	$(DOCS) completion fish >$(DESTDIR)$(FISHDIR)/particle.fish
ifeq ($(PREFIX),/usr)
	install -D -m 755 $(BIN)/particle-init-root $(DESTDIR)/usr/lib/particle/particle-init-root
	$(DOCS) initramfs $(DESTDIR)/
	mkdir -p $(DESTDIR)$(UNITDIR)
	cd packaging/systemd && cp -dR --preserve=mode,links *.service *.socket *.path *.timer *.d *.wants $(abspath $(DESTDIR)/)$(UNITDIR)
	install -D -m 644 packaging/systemd/80-particle.preset $(DESTDIR)/usr/lib/systemd/system-preset/80-particle.preset
endif

.PHONY: deb
deb:
	packaging/deb.sh dist

.PHONY: demo
demo: root all
	tests/demo/demo.sh

.PHONY: test
test: root all
	tests/setup/test.sh

.PHONY: test-boot
test-boot: root all
	. $$(tests/setup/setup.sh | tail -n 1) && tests/setup/images.sh && \
	PARTICLE_TEST_BOOT=all $(GO) test -count=1 -v -timeout 6h -parallel 2 -skip TestCrash ./tests/boot

# What was found stays in CRASH_DIR: a run that was stopped is gone on with.
CRASH_DIR    ?= /var/tmp/particle-crash
CRASH_POINTS ?= 60
CRASH_JOBS   ?= 2

.PHONY: test-crash
test-crash: root all
	. $$(tests/setup/setup.sh | tail -n 1) && tests/setup/images.sh && \
	PARTICLE_TEST_BOOT=all PARTICLE_TEST_CRASH_DIR=$(CRASH_DIR) PARTICLE_TEST_CRASH_POINTS=$(CRASH_POINTS) \
	PARTICLE_TEST_CRASH_JOBS=$(CRASH_JOBS) $(GO) test -count=1 -v -timeout 12h -run TestCrash ./tests/boot

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
	rm -rf bin dist

.PHONY: root
root:
	@[ "$$(id -u)" = 0 ] || { echo "this needs root: sudo make $(MAKECMDGOALS)" >&2; exit 1; }
