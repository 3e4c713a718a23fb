package auth

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http/httptest"
	"strings"
	"testing"
	"unicode/utf8"
)

type pairRequest struct{ A, B string }

func (r *pairRequest) members() []member {
	return []member{{name: "a", text: &r.A}, {name: "b", text: &r.B, optional: true}}
}

func TestDecodeObject(t *testing.T) {
	const ok = ""
	for _, row := range []struct{ body, want string }{
		{``, "body not_json"},
		{`[]`, "body not_an_object"},
		{`"a"`, "body not_an_object"},
		{`{"a":"x"}{}`, "body not_json"},
		{`{"a":"x"} x`, "body not_json"},
		{"\ufeff" + `{"a":"x"}`, "body not_json"},
		{`{"a":'x'}`, "body not_json"},
		{`{"a":"x",}`, "body not_json"},
		{`{"a":"` + "\n" + `"}`, "body not_json"},
		{strings.Repeat(`{"a":`, 20000), "body not_json"},
		{`{}`, "a missing"},
		{`{"a":null}`, "a null"},
		{`{"a":1}`, "a wrong_type"},
		{`{"a":{}}`, "a wrong_type"},
		{`{"a":["x"]}`, "a wrong_type"},
		{`{"a":"x","a":"x"}`, "a duplicate"},
		{`{"a":"x","\u0061":"x"}`, "a duplicate"},
		{`{"A":"x"}`, "A unknown, a missing"},
		{`{"a":"x","c":1}`, "c unknown"},
		{`{"a":"x","b":2}`, "b wrong_type"},
		{`{"a":"x","b":""}`, "b empty"},
		{`{"a":"\ud800"}`, "a invalid_unicode"},
		{`{"a":"\ud800x"}`, "a invalid_unicode"},
		{`{"a":"\ud800\u0041"}`, "a invalid_unicode"},
		{`{"a":"\udc00\ud800"}`, "a invalid_unicode"},
		{`{"a":"\udC00"}`, "a invalid_unicode"},
		{"{\"a\":\"\xff\"}", "a invalid_unicode"},
		{"{\"a\":\"\xed\xa0\x80\"}", "a invalid_unicode"}, // CESU-8
		{`{"a":"x","b":null}`, ok},
		{`{"a":"\ud83d\ude00"}`, ok},
		{`{"a":"\\ud800"}`, ok}, // a backslash and text
		{`{"a":"\u0000"}`, ok},
		{" {\t\"a\" : \"x\" }\r\n", ok},
	} {
		var in pairRequest
		var got []string
		var f *failure
		if err := decodeObject([]byte(row.body), in.members()); errors.As(err, &f) {
			for _, e := range f.fields {
				got = append(got, e.Field+" "+e.Reason)
			}
		}
		if strings.Join(got, ", ") != row.want {
			t.Errorf("%.40q: got %q, want %q", row.body, got, row.want)
		}
	}
}

// What is accepted is one object whose members encoding/json reads alike, and
// no text was replaced on the way.
func FuzzDecodeObject(f *testing.F) {
	for _, seed := range []string{`{"a":"x"}`, `{"a":"\ud83d\ude00","b":null}`, `{"a":"x","a":"y"}`, `{"a":"\ud800"}`, "{\"a\":\"\xff\"}", `{"A":"x"}`, `[`, `{"a":{"a":[]}}`} {
		f.Add([]byte(seed))
	}
	for _, text := range rfc8259Texts {
		f.Add([]byte(text))
		f.Add([]byte(`{"a":` + text + `}`))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var in pairRequest
		if decodeObject(body, in.members()) != nil {
			return
		}
		var m map[string]*string
		if err := json.Unmarshal(body, &m); err != nil || m["a"] == nil || *m["a"] != in.A {
			t.Fatalf("%q: decoded %q, encoding/json %v %v", body, in.A, m, err)
		}
		if !utf8.Valid(body) {
			t.Fatalf("%q: accepted invalid UTF-8", body)
		}
		again, _ := json.Marshal(struct {
			A string `json:"a"`
			B string `json:"b,omitempty"`
		}{in.A, in.B})
		var second pairRequest
		if err := decodeObject(again, second.members()); err != nil || second != in {
			t.Fatalf("%q: %v reads back as %v, %v", body, in, second, err)
		}
	})
}

// Beyond smallBody a body needs a place; small ones never wait for it.
func TestLargeBodiesTakeTurns(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel() // its deadline has passed: whatever waits does so in vain
	read := func(ctx context.Context, size int) error {
		r := httptest.NewRequestWithContext(ctx, "POST", "/", struct{ io.Reader }{strings.NewReader(strings.Repeat(" ", size))}) // of unknown length
		r.Header.Set("Content-Type", "application/json")
		body, err := readBody(httptest.NewRecorder(), r, "application/json")
		if err == nil && len(body) != size {
			t.Errorf("a body of %d bytes: got %d", size, len(body))
		}
		return err
	}
	for range 2 * cap(largeBodies) {
		for size, want := range map[int]error{smallBody - 1: nil, smallBody: nil, smallBody + 1: nil, maxBody: nil, maxBody + 1: errBodyTooLarge} {
			if err := read(t.Context(), size); !errors.Is(err, want) {
				t.Fatalf("a body of %d bytes: got %v, want %v", size, err, want)
			}
		}
	}
	for range cap(largeBodies) {
		largeBodies <- struct{}{}
	}
	defer func() {
		for range cap(largeBodies) {
			<-largeBodies
		}
	}()
	if err := read(over, smallBody-1); err != nil {
		t.Errorf("a small body while all places are taken: got %v", err)
	}
	if err := read(over, smallBody+1); !errors.Is(err, errBodyTimeout) {
		t.Errorf("a large body while all places are taken: got %v, want %v", err, errBodyTimeout)
	}
}
