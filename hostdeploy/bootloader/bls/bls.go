// Package bls reads and writes the key-value lines of the Boot Loader Specification
// (https://uapi-group.org/specifications/specs/boot_loader_specification/).
package bls

// A Field is one line: keys may repeat, and their order matters.
type Field struct{ Key, Value string }
