package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// A client speaks the OCI distribution protocol for one repository.
type client struct {
	repo    repository
	host    string // that requests go to; docker.io has another one
	scheme  string // the one to begin with, which the transport corrects
	http    *http.Client
	retries int
	agent   *http.Transport // to close idle connections
}

// dockerHost is where the registry of docker.io answers.
const dockerHost = "index.docker.io"

// newClient makes the first contact: it finds out whether the registry speaks HTTPS,
// and exchanges credentials for a token where it wants one. actions is "pull" or
// "pull,push"; from lists further repositories of the registry to pull from.
func newClient(ctx context.Context, ref Ref, opts *Options, actions string, from ...string) (*client, error) {
	c := &client{repo: repository{ref.Host, ref.Repo}, host: ref.Host, retries: opts.retries()}
	if c.host == "docker.io" {
		c.host = dockerHost
	}
	plainOK := opts.Insecure || isLoopback(c.host)
	var nameOpts []name.Option
	if c.scheme = "https"; plainOK {
		nameOpts = append(nameOpts, name.Insecure) // try HTTPS first, then HTTP
		c.scheme = "http"
	}
	reg, err := name.NewRegistry(c.host, nameOpts...)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrReference, err)
	}
	auth, err := authn.Resolve(ctx, opts.Auth.keychain(), c.repo)
	if err != nil {
		return nil, err
	}
	if c.agent, err = newAgent(c.repo.host, opts); err != nil {
		return nil, err
	}
	var rt http.RoundTripper = &retrying{inner: &guard{c.agent, opts.Insecure}, retries: c.retries}
	rt = transport.NewUserAgent(rt, opts.UserAgent)
	scopes := []string{"repository:" + ref.Repo + ":" + actions}
	for _, repo := range from {
		scopes = append(scopes, "repository:"+repo+":pull")
	}
	rt, err = transport.NewWithContext(ctx, reg, auth, rt, scopes)
	if err != nil {
		c.agent.CloseIdleConnections()
		return nil, c.explain(err)
	}
	c.http = &http.Client{Transport: rt, CheckRedirect: checkRedirect}
	return c, nil
}

// certDirs are where podman and Docker keep certificates by registry.
var certDirs = []string{"/etc/containers/certs.d", "/etc/docker/certs.d"}

// newAgent returns the HTTP transport with the registry's certificates.
func newAgent(host string, opts *Options) (*http.Transport, error) {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConnsPerHost = 16
	t.ResponseHeaderTimeout = 5 * time.Minute // some registries digest a blob before they answer
	// Go would ask for gzip and unpack it in passing, and the bytes would not be those
	// that the digest is of.
	t.DisableCompression = true
	t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: opts.Insecure}
	if opts.CertDir != "" {
		return t, addCertificates(t.TLSClientConfig, opts.CertDir)
	}
	for _, dir := range certDirs {
		err := addCertificates(t.TLSClientConfig, filepath.Join(dir, host))
		if !errors.Is(err, fs.ErrNotExist) {
			return t, err
		}
	}
	return t, nil
}

// addCertificates takes all of a directory, as containers-certs.d(5) has it.
func addCertificates(config *tls.Config, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("reading certificates: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	for _, e := range entries {
		file := filepath.Join(dir, e.Name())
		switch filepath.Ext(file) {
		case ".crt":
			pem, err := os.ReadFile(file)
			if err != nil {
				return fmt.Errorf("reading certificates: %w", err)
			}
			if !pool.AppendCertsFromPEM(pem) {
				return fmt.Errorf("%w: %q holds no PEM certificate", ErrInvalid, file)
			}
		case ".cert":
			pair, err := tls.LoadX509KeyPair(file, strings.TrimSuffix(file, ".cert")+".key")
			if err != nil {
				return fmt.Errorf("reading client certificate: %w", err)
			}
			config.Certificates = append(config.Certificates, pair)
		}
	}
	config.RootCAs = pool
	return nil
}

// isLoopback tells whether host[:port] can only be this machine.
func isLoopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.Unmap().IsLoopback()
	}
	return host == "localhost" || strings.HasSuffix(host, ".localhost") // RFC 6761 section 6.3
}

// isPrivate tells whether a host is an address that means something else to this
// machine than to the registry that points there. A name of digits is an address in
// one of the old spellings (2130706433), which are never needed.
func isPrivate(host string) bool {
	addr, err := netip.ParseAddr(host)
	if err != nil {
		last := host[strings.LastIndexByte(strings.TrimSuffix(host, "."), '.')+1:]
		return last != "" && last[0] >= '0' && last[0] <= '9' || isLoopback(host)
	}
	addr = addr.Unmap()
	return addr.IsLoopback() || addr.IsPrivate() || addr.IsLinkLocalUnicast() || addr.IsUnspecified() || addr.IsMulticast()
}

// checkTarget refuses to be sent from one host to a private address of another: a
// hostile registry could reach services that only this machine can reach.
func checkTarget(from, to *url.URL) error {
	if from.Hostname() != to.Hostname() && isPrivate(to.Hostname()) && !isPrivate(from.Hostname()) {
		return fmt.Errorf("%w: %s sends requests on to the private address %q", ErrUnsupported, from.Host, to.Hostname())
	}
	return nil
}

func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return errors.New("stopped after 10 redirects")
	}
	return checkTarget(via[0].URL, req.URL)
}

// guard keeps plain HTTP, and with it credentials, from hosts for which it is not
// allowed, wherever the request comes from: first contact, redirect or token realm.
type guard struct {
	inner    http.RoundTripper
	insecure bool
}

func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !g.insecure && !isLoopback(req.URL.Host) {
		return nil, fmt.Errorf("%w: plain HTTP to %s; allow it by the option for insecure registries", ErrUnsupported, req.URL.Host)
	}
	return g.inner.RoundTrip(req)
}

// retrying repeats requests that failed for a passing reason. Requests with a body
// that can only be sent once pass through: their sender repeats them.
type retrying struct {
	inner   http.RoundTripper
	retries int
}

func (r *retrying) RoundTrip(req *http.Request) (*http.Response, error) {
	if b, ok := req.Body.(*blobBody); ok {
		body, err := b.renew()
		if err != nil {
			return nil, err
		}
		req = req.Clone(req.Context())
		req.Body = body
	}
	for try := 0; ; try++ {
		resp, err := r.inner.RoundTrip(req)
		if try >= r.retries || req.Body != nil && req.GetBody == nil || !passing(resp, err) {
			return resp, err
		}
		wait := delay(try)
		if resp != nil {
			// Section 10.2.3 of RFC 9110; dates are not worth the code.
			if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s >= 0 {
				wait = min(time.Duration(s)*time.Second, maxDelay)
			}
			io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<16))
			resp.Body.Close()
		}
		if err := sleep(req.Context(), wait); err != nil {
			return nil, err
		}
		if req.Body != nil {
			req = req.Clone(req.Context())
			if req.Body, err = req.GetBody(); err != nil {
				return nil, err
			}
		}
	}
}

const maxDelay = 30 * time.Second

// delay is how long to wait after a try: about 0.2 s, 0.6 s, 1.8 s…
func delay(try int) time.Duration {
	d := 200 * time.Millisecond
	for range min(try, 8) {
		d *= 3
	}
	return min(d, maxDelay) * time.Duration(90+rand.IntN(20)) / 100
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// passing tells whether a failure may be gone on the next try.
func passing(resp *http.Response, err error) bool {
	if err != nil {
		return passingError(err)
	}
	switch resp.StatusCode {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

func passingError(err error) bool {
	var timeout net.Error
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	var status *transport.Error
	if errors.As(err, &status) {
		return passing(&http.Response{StatusCode: status.StatusCode}, nil)
	}
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed) || errors.As(err, &timeout) && timeout.Timeout()
}

// url returns the address of something in the repository.
func (c *client) url(kind, id string) *url.URL {
	return &url.URL{Scheme: c.scheme, Host: c.host, Path: "/v2/" + c.repo.repo + "/" + kind + "/" + id}
}

// do sends a request and gives any answer but those in want as an error.
func (c *client) do(req *http.Request, want ...int) (*http.Response, error) {
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if err := transport.CheckError(resp, want...); err != nil {
		resp.Body.Close()
		return nil, c.explain(err)
	}
	return resp, nil
}

// explain gives errors of the protocol their place in the table of this package.
func (c *client) explain(err error) error {
	var status *transport.Error
	if !errors.As(err, &status) {
		return err
	}
	switch status.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%w to %s: %w; log in with particle login %s, or check the name: many registries deny what does not exist", ErrUnauthorized, c.repo, err, c.repo.host)
	case http.StatusNotFound:
		return fmt.Errorf("%w in %s: %w", ErrNotFound, c.repo, err)
	}
	return err
}

func (c *client) close() { c.agent.CloseIdleConnections() }
