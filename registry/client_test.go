package registry

import (
	"errors"
	"net/http"
	"net/url"
	"testing"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// TestGuard: plain HTTP goes to loopback addresses only, if nobody allowed more.
func TestGuard(t *testing.T) {
	reached := roundTripper(func(*http.Request) (*http.Response, error) { return &http.Response{}, nil })
	for u, plainOK := range map[string]bool{
		"http://localhost/": true, "http://localhost:5000/": true, "http://x.localhost/": true, "http://127.1.2.3:5/": true, "http://[::1]:5/": true, "http://[::ffff:127.0.0.1]/": true,
		"http://10.0.0.1/": false, "http://example.com/": false, "http://localhost.example.com/": false, "http://127.0.0.1.example.com/": false, "https://example.com/": true,
	} {
		req, err := http.NewRequest(http.MethodGet, u, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (&guard{inner: reached}).RoundTrip(req); plainOK != (err == nil) || err != nil && !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: got %v, want it allowed: %v", u, err, plainOK)
		}
		if _, err := (&guard{inner: reached, insecure: true}).RoundTrip(req); err != nil {
			t.Errorf("%s when insecure is allowed: %v", u, err)
		}
	}
}

// TestCheckTarget: a public registry cannot send this machine to its own neighbours.
func TestCheckTarget(t *testing.T) {
	for _, c := range []struct {
		from, to string
		ok       bool
	}{
		{"https://registry.example/", "https://cdn.example/x", true},
		{"https://registry.example/", "https://203.0.113.5/x", true},
		{"https://registry.example/", "https://registry.example:8443/x", true},
		{"https://10.0.0.1/", "https://10.0.0.2/x", true},
		{"http://127.0.0.1:5000/", "http://localhost:6000/x", true},
		{"https://registry.example/", "http://169.254.169.254/latest/meta-data", false},
		{"https://registry.example/", "https://localhost/x", false},
		{"https://registry.example/", "https://[::1]/x", false},
		{"https://registry.example/", "https://[::ffff:10.0.0.1]/x", false},
		{"https://registry.example/", "https://192.168.1.1/x", false},
		{"https://registry.example/", "https://2130706433/x", false},
		{"https://registry.example/", "https://127.1/x", false},
		{"https://registry.example/", "https://0x7f000001/x", false},
		{"https://registry.example/", "https://0/x", false},
	} {
		from, err := url.Parse(c.from)
		if err != nil {
			t.Fatal(err)
		}
		to, err := url.Parse(c.to)
		if err != nil {
			t.Fatal(err)
		}
		if err := checkTarget(from, to); c.ok != (err == nil) {
			t.Errorf("from %s to %s: got %v, want it allowed: %v", from, to, err, c.ok)
		}
	}
}
