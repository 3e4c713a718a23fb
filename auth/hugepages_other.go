//go:build !linux

package auth

// hugePages are known on Linux only.
type hugePages struct{}

func findHugePages(int, int) hugePages { return hugePages{} }
func (hugePages) advise(bool)          {}
