package guest

import (
	"encoding/json"
	"io"
	"strings"
	"testing"
)

// talk sends lines to an agent of boot "b" and returns its responses by id.
func talk(t *testing.T, lines ...string) map[int]Response {
	t.Helper()
	in, feed := io.Pipe()
	answers, out := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- Serve(in, out, "b")
		out.Close()
	}()
	wanted := 1
	for _, l := range lines {
		var r Request
		if json.Unmarshal([]byte(l), &r) == nil && r.Boot == "b" && !r.Kill {
			wanted++
		}
	}
	go func() {
		for _, l := range lines {
			io.WriteString(feed, l+"\n")
		}
	}()
	got := map[int]Response{}
	for s := NewScanner(answers); len(got) < wanted && s.Scan(); {
		if len(s.Bytes()) == 0 {
			continue
		}
		var r Response
		if err := json.Unmarshal(s.Bytes(), &r); err != nil {
			t.Fatalf("response %q: %v", s.Text(), err)
		}
		got[r.ID] = r
	}
	feed.Close()
	go io.Copy(io.Discard, answers)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return got
}

func TestServe(t *testing.T) {
	got := talk(t,
		`a line cut off by a rese{"boot":"b","id":9`,
		`{"boot":"an earlier boot","id":8,"command":"echo must not run"}`,
		`{"boot":"b","id":1,"command":"echo out; echo err >&2; exit 3"}`,
		`{"boot":"b","id":2,"command":"cat","stdin":"`+"AAEK"+`"}`,
		`{"boot":"b","id":3,"command":"kill -TERM $$"}`,
		`{"boot":"b","id":4,"command":"sleep 1000 | cat"}`,
		`{"boot":"b","id":4,"kill":true}`,
	)
	if len(got) != 5 {
		t.Fatalf("%d responses, want 5: %v", len(got), got)
	}
	if r := got[0]; r.Boot != "b" {
		t.Errorf("hello is %+v", r)
	}
	if r := got[1]; string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" || r.Status != 3 {
		t.Errorf("stdout %q, stderr %q, status %d", r.Stdout, r.Stderr, r.Status)
	}
	if r := got[2]; string(r.Stdout) != "\x00\x01\n" || r.Status != 0 {
		t.Errorf("stdin came back as %q, status %d", r.Stdout, r.Status)
	}
	if r := got[3]; r.Status != 128+15 {
		t.Errorf("status after SIGTERM %d", r.Status)
	}
	if r := got[4]; r.Status != 128+9 {
		t.Errorf("status after kill %d (%s)", r.Status, r.Error)
	}
}

func TestServeHello(t *testing.T) {
	var out strings.Builder
	if err := Serve(strings.NewReader(`{"hello":true}`+"\n"), &out, "b"); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), `{"boot":"b","status":0}`); n != 2 {
		t.Errorf("%d announcements, want 2: %q", n, out.String())
	}
}
