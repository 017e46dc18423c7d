//go:build !mutants

package mutant

// On reports whether a bug is planted: none is in a program that is built for use.
func On(string) bool { return false }
