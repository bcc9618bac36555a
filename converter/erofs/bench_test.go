package erofs_test

import (
	"bytes"
	"io"
	"testing"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/erofs"
)

func BenchmarkWrite(b *testing.B) {
	t := parse(b, read(b, conformance+"/cs9-x86_64-developer.dump.gz"), dump.Options{})
	b.ReportAllocs()
	for b.Loop() {
		if err := erofs.Write(io.Discard, t, erofs.Options{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead(b *testing.B) {
	image := write(b, parse(b, read(b, conformance+"/cs9-x86_64-developer.dump.gz"), dump.Options{}), erofs.V1)
	b.SetBytes(int64(len(image)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := erofs.Read(bytes.NewReader(image), int64(len(image))); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkObjects(b *testing.B) {
	image := write(b, parse(b, read(b, conformance+"/cs9-x86_64-developer.dump.gz"), dump.Options{}), erofs.V1)
	b.SetBytes(int64(len(image)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := erofs.Objects(bytes.NewReader(image), int64(len(image))); err != nil {
			b.Fatal(err)
		}
	}
}
