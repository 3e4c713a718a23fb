package auth

import (
	"reflect"
	"runtime"
	"syscall"
)

// hugePages are the addresses where hash buffers come to lie. Argon2 reads its
// buffer at random, and in pages of 4 KiB misses the TLB all the time: on huge
// pages a hash takes a fifth less. The runtime gives a buffer the lowest free
// addresses that fit, so those that the first buffers had serve later ones too;
// where one does not fit, it costs time and nothing else. The advice holds
// while hashes are under way only: later a few small objects of other requests
// would hold two MiB each.
type hugePages struct {
	buffers []uintptr
	length  uintptr
}

// findHugePages finds the addresses of n buffers. Small objects come to lie
// between them, so it looks at room for twice as many.
func findHugePages(n, bytes int) hugePages {
	h := hugePages{length: uintptr(bytes)}
	buffers := make([][]byte, 2*n)
	for i := range buffers {
		buffers[i] = make([]byte, bytes) // not written to, so without memory
		h.buffers = append(h.buffers, reflect.ValueOf(buffers[i]).Pointer())
	}
	clear(buffers)
	runtime.GC()
	return h
}

// advise says whether huge pages are wanted. Advice changes nothing that
// memory holds, so that it may be given about the runtime's memory; what the
// system makes of it does not matter here.
func (h hugePages) advise(wanted bool) {
	advice := map[bool]uintptr{true: syscall.MADV_HUGEPAGE, false: syscall.MADV_NOHUGEPAGE}[wanted]
	for _, at := range h.buffers {
		syscall.Syscall(syscall.SYS_MADVISE, at, h.length, advice)
	}
}
