package auth

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/7d-solutions/identity-auth/db"
)

func TestPasswordPolicy(t *testing.T) {
	email, err := db.ParseEmail("margaret.h@example.com")
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(list, []byte("\r\nHammer Horse Seven\r\n\nlast line without an end"), 0o600); err != nil {
		t.Fatal(err)
	}
	blocklist, err := LoadBlocklist(list)
	if err != nil {
		t.Fatal(err)
	}
	policy := passwordPolicy{minLength: 12, blocklist: blocklist}
	for _, row := range []struct{ password, want string }{
		{"", "[too_short common]"},
		{"tiny-but-odd", "[]"},
		{"eleven char", "[too_short]"},
		{"ééééééééééé", "[too_short common]"}, // code points, not bytes
		{strings.Repeat("long and odd ", 79), "[too_long]"},
		{"margaret.h@example.com!", "[contains_email]"},
		{"I am MARGARET.H you see", "[contains_email]"},
		{"hammer horse SEVEN", "[blocklisted]"},
		{"last line without an end", "[blocklisted]"},
		{"StrongPassword123", "[]"},
		{"correct horse battery staple", "[]"},
		{"Tr0ub4dor&3 and more", "[]"},
		{"hunter sees the moon", "[]"},
		{"7f3kq0zv91mw", "[]"},
		{"94837261504938271605", "[]"},
		{"сильный пароль тут", "[]"},
		{"password1234", "[common]"},
		{"Password2024!", "[common]"},
		{"P@ssw0rd2024!!", "[common]"},
		{"p4$$w0rd1234", "[common]"},
		{"2024Welcome2024", "[common]"},
		{"passwordpassword", "[common]"},
		{"PasswordPassword1!", "[common]"},
		{"iloveyou2023", "[common]"},
		{"Administrator1", "[common]"},
		{"1dmin1str1tor", "[]"},
		{"qwertyuiop[]", "[common]"},
		{"qwertyuiop123", "[common]"},
		{"1qaz2wsx3edc", "[common]"},
		{"1q2w3e4r5t6y", "[common]"},
		{"asdfghjklzxc", "[common]"},
		{"poiuytrewq09", "[common]"},
		{"123456789012", "[common]"},
		{"987654321098", "[common]"},
		{"111111111111", "[common]"},
		{"aaaaaaaaaaaa", "[common]"},
		{"abababababab", "[common]"},
		{"abcabcabcabc", "[common]"},
		{"abcdefghijkl", "[common]"},
		{"abcd12345678", "[common]"},
		{"letmein12345", "[common]"},
		{"Summer2024!!", "[common]"},
		{"december2023!", "[common]"},
		{"changeme1234", "[common]"},
		{"112233445566", "[common]"},
		{"Passw0rd!Passw0rd!", "[common]"},
	} {
		if got := fmt.Sprint(policy.check(row.password, email)); got != row.want {
			t.Errorf("%.30q: got %s, want %s", row.password, got, row.want)
		}
	}
}
