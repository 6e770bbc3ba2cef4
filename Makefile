# `make help` lists what there is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Tools that a login shell would find.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/go/bin:/usr/sbin:/sbin

# Tests on real disks, mounts and processes: they need root and run in a mount namespace of their own, so that nothing
# they mount outlives them. A new one is picked up by its name; one named otherwise is added here.
REAL_TESTS := $(patsubst tests/%.rs,%,$(wildcard tests/real_*.rs tests/demo_*.rs))
# Tests that need a browser.
BROWSER_TESTS := sim_page
# All others, which need nothing.
PLAIN_TESTS := $(filter-out $(REAL_TESTS) $(BROWSER_TESTS),$(patsubst tests/%.rs,%,$(wildcard tests/*.rs)))
PLAIN_TESTS += $(patsubst tests/%/main.rs,%,$(wildcard tests/*/main.rs))
# Tests over a real API server: its own target builds it first.
API_SERVER_TESTS := kubernetes_real
# The chart and the manifests, with helm and the CSI sidecars: likewise.
DEPLOY_TESTS := deploy
# Tests in real guests: slow, and one at a time.
VM_TESTS := vm
PLAIN_TESTS := $(filter-out $(API_SERVER_TESTS) $(DEPLOY_TESTS) $(VM_TESTS),$(PLAIN_TESTS))

# Runs a command in a mount namespace of its own; empty where that is not allowed.
UNSHARE := unshare --mount --propagation private
OWN_MOUNTS := $(shell $(UNSHARE) true 2>/dev/null && echo $(UNSHARE))
# The same with a process namespace: should the demo be killed, the kernel ends all that it started.
UNSHARE_ALL := $(UNSHARE) --pid --fork --kill-child --mount-proc
OWN_PROCESSES := $(shell $(UNSHARE_ALL) true 2>/dev/null && echo $(UNSHARE_ALL))

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## Show the driver at work against the simulator; ARGS goes to the command
	@tests/prepare.sh demo
	cargo build --bins --example demo
	$(OWN_PROCESSES) target/debug/examples/demo $(ARGS)

.PHONY: demo-vm
demo-vm: ## The same with VMs that are real: a QEMU and a kernel each (no root); KERNEL=6.12 for another one
	@tests/prepare.sh vm
	cargo build --bins --example demo
	target/debug/examples/demo --image "$$(tests/guest-image/build.sh $(or $(KERNEL),6.1) target/debug/proxmox-csi)" $(ARGS)

.PHONY: test
test: ## Run everything: check, unit, clients, real, sanity, test-kubernetes, test-deploy
	@tests/prepare.sh test
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory clients
	@$(MAKE) --no-print-directory real
	@$(MAKE) --no-print-directory sanity
	@$(MAKE) --no-print-directory test-kubernetes
	@$(MAKE) --no-print-directory test-deploy

.PHONY: check
check: ## Formatting and clippy
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings

.PHONY: unit
unit: ## Tests that need neither root nor devices
	cargo test --no-fail-fast --lib --bins $(addprefix --test ,$(PLAIN_TESTS))

.PHONY: soak
soak: ## Play the model test over many seeds: SEEDS=1000 STEPS=200 FROM=0
	MODEL_SEEDS=$(or $(SEEDS),1000) MODEL_STEPS=$(or $(STEPS),200) MODEL_FROM=$(or $(FROM),0) \
		cargo test --profile soak --test model -- --ignored --exact soak --nocapture

# What a fuzzer tries, and for how many seconds each.
FUZZ_TARGETS := $(patsubst fuzz/targets/%.rs,%,$(wildcard fuzz/targets/*.rs))
SECONDS_EACH := 600

.PHONY: fuzz
fuzz: ## Fuzz what comes from outside, with cargo-fuzz; FUZZ_TARGETS=handles SECONDS_EACH=60 for less
	@command -v cargo-fuzz >/dev/null || { echo 'cargo-fuzz is missing: cargo install cargo-fuzz --locked' >&2; exit 1; }
	@command -v c++ >/dev/null || { echo 'libFuzzer is written in C++: apt-get install g++' >&2; exit 1; }
	for target in $(FUZZ_TARGETS); do \
	  cargo fuzz run --sanitizer none $$target fuzz/target/grown/$$target fuzz/corpus/$$target -- \
	    -max_total_time=$(SECONDS_EACH) -max_len=4096 -print_final_stats=1 || exit; \
	done

.PHONY: clients
clients: ## Go clients of others, and a browser, against the simulator
	cargo build --bin pve-sim
	cd tests/clients && PVE_SIM=$(CURDIR)/target/debug/pve-sim go test -count=1 ./...
	cargo test --no-fail-fast $(addprefix --test ,$(BROWSER_TESTS))

.PHONY: real
real: needs-own-mounts ## Tests on real disks (root)
	cargo build --bins --example demo
	cargo test --no-run $(addprefix --test ,$(REAL_TESTS))
	$(UNSHARE) cargo test --no-fail-fast $(addprefix --test ,$(REAL_TESTS))

.PHONY: sanity
sanity: needs-own-mounts ## csi-sanity in mount and in block mode, on four types of storage (root)
	cargo build --bins --example demo
	cd tests/sanity && go build -o bin/csi-sanity github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity
	printf '%s\n' {mount,block}\ {shared,thin,tank,ceph} | xargs --max-procs=2 --max-lines=1 $(UNSHARE) tests/sanity/sanity.sh

.PHONY: test-kubernetes
test-kubernetes: kubernetes-servers ## Tests over a real etcd and kube-apiserver
	cargo test --no-fail-fast $(addprefix --test ,$(API_SERVER_TESTS)) -- --test-threads=8

.PHONY: test-vm
test-vm: ## Tests in real guests: QEMU, a kernel of Debian's, the node plugin in it
	@tests/prepare.sh vm
	nice cargo test --no-fail-fast $(addprefix --test ,$(VM_TESTS)) -- --test-threads=1

.PHONY: soak-vm
soak-vm: ## Volumes that move at random on three real guests for SECONDS=600, and how long each step takes
	VM_SOAK_SECONDS=$(or $(SECONDS),600) nice cargo test --test vm -- --exact --nocapture soak::volumes_that_move_at_random_keep_every_byte

.PHONY: test-deploy
test-deploy: kubernetes-servers deploy-tools ## The chart, the manifests and the CSI sidecars over a real kube-apiserver
	cargo test --no-fail-fast $(addprefix --test ,$(DEPLOY_TESTS)) -- --test-threads=4

.PHONY: deploy-tools
deploy-tools:
	@tests/deploy/build.sh

.PHONY: images
images: needs-own-mounts ## Build the images with buildah, without a registry, and run the demo out of them (root)
	@tests/prepare.sh images
	deploy/image/build.sh
	cargo build --bin pve-sim --example demo
	deploy/image/demo.sh

.PHONY: book
book: ## The documentation as a site
	deploy/book/build.sh

.PHONY: kubernetes
kubernetes: kubernetes-servers ## Start a Kubernetes control plane to try things on, until Ctrl-C
	cargo run --example kubernetes

.PHONY: kubernetes-servers
kubernetes-servers:
	@tests/kubernetes/servers/build.sh

.PHONY: needs-own-mounts
needs-own-mounts:
	@[[ -n "$(OWN_MOUNTS)" ]] || { echo 'these tests mount real disks and need root with CAP_SYS_ADMIN; `make check unit` runs the rest' >&2; exit 1; }

.PHONY: fmt
fmt: ## Format the code
	cargo fmt

.PHONY: lint
lint: check ## check, and what more the installed tools find: shellcheck, cargo-deny
	@if command -v shellcheck >/dev/null; then shellcheck $$(git ls-files '*.sh' '.ci/*'); else echo 'lint: shellcheck is not installed, scripts NOT CHECKED'; fi
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo 'lint: cargo-deny is not installed, dependencies NOT CHECKED'; fi

.PHONY: clean
clean: ## Remove what was built
	cargo clean
	rm -rf fuzz/target tests/sanity/bin tests/deploy/bin tests/kubernetes/servers/bin dist
